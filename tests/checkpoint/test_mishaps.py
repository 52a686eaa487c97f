"""What can go wrong with checkpoints: damage, death, other runs, other models, malice.

One process goes through all of it with a real engine whose every number is the step it was saved
at, so that what is loaded tells where it came from; the tests look at what came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tools import IDENTITY, RANK_FILE, Listener, index_of
from tests.engines.tools import SIZE, Trial, objective
from tests.helpers import spawn
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded
from twinflow_train.errors import UserError

OWN_TEACHER = objective(teacher_decay=0.0)


@dataclass
class Bench:
    """An engine with its checkpoints in a folder."""

    engine: Sharded
    world: World
    folder: Path
    identity: dict[str, Any] = field(default_factory=lambda: IDENTITY)
    keep: int = 9
    progress: Progress = field(default_factory=Progress)

    @property
    def saves(self) -> Checkpoints:
        return Checkpoints(
            folder=self.folder,
            engine=self.engine,
            progress=self.progress,
            world=self.world,
            identity=self.identity,
            keep=self.keep,
        )

    def at(self, folder: Path, **changes: Any) -> Bench:
        """The same engine with another folder and fresh progress."""
        return replace(self, folder=folder, progress=Progress(), **changes)

    def write(self, step: int, value: float | None = None) -> None:
        """Save a state whose every number is `value`, the step unless given."""
        with torch.no_grad():
            for span in self.engine.spans():
                span.local.fill_(step if value is None else value)
        self.engine.restored(step)
        self.progress.step, self.progress.samples = step, 8 * step
        saves = self.saves
        saves.write()
        saves.finish()

    def steps(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def resume(self, *, must: bool = False) -> Resumed:
        """Resume from numbers that no checkpoint has, and tell what came of it."""
        with torch.no_grad():
            for span in self.engine.spans():
                span.local.fill_(-1.0)
        self.progress = Progress()
        with Listener() as listener:
            try:
                found, error = self.saves.resume(must=must), ""
            except UserError as raised:
                found, error = False, f"{type(raised).__name__}: {raised}"
        low = min(float(span.local.min()) for span in self.engine.spans() if span.local.numel())
        high = max(float(span.local.max()) for span in self.engine.spans() if span.local.numel())
        return Resumed(
            found=found,
            step=self.progress.step,
            values=(low, high),
            warnings=listener.heard,
            error=error,
        )


@dataclass
class Resumed:
    """What a resume came to; `values`: the least and the largest number of the state."""

    found: bool
    step: int
    values: tuple[float, float]
    warnings: list[str]
    error: str

    def is_whole(self, step: int, value: float | None = None) -> bool:
        """Tell whether it is the state of that step, in every number, without complaint."""
        want = float(step if value is None else value)
        good = self.found and self.step == step and self.values == (want, want)
        return good and not self.error


def flip(path: Path, position: int, bit: int = 0x01) -> None:
    """Flip one bit of a file; a negative position counts from its end."""
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def reseal(folder: Path, **changes: Any) -> None:
    """Make the digests fit again, as someone would who means harm."""
    index = index_of(folder) | changes
    index["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in index["files"]
    }
    text = json.dumps(index)
    (folder / "index.json").write_text(text)
    seal = {"version": index["version"], "index": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "COMPLETE").write_text(json.dumps(seal))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change where the index says that a tensor lies, with a seal that fits."""
    index = index_of(folder)
    change(next(iter(index["tensors"].values())))
    reseal(folder, tensors=index["tensors"])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no COMPLETE": lambda path: (path / "COMPLETE").unlink(),
    "empty COMPLETE": lambda path: (path / "COMPLETE").write_text(""),
    "COMPLETE of another kind": lambda path: (path / "COMPLETE").write_text("[]"),
    "no index": lambda path: (path / "index.json").unlink(),
    "truncated index": lambda path: cut(path / "index.json"),
    "byte of the index": lambda path: flip(path / "index.json", 40),
    "last byte of the index": lambda path: flip(path / "index.json", -1),
    "no rank file": lambda path: (path / RANK_FILE).unlink(),
    "truncated rank file": lambda path: cut(path / RANK_FILE),
    "byte of a header": lambda path: flip(path / RANK_FILE, 30),
    "byte of a tensor": lambda path: flip(path / RANK_FILE, -5),
    "first byte of COMPLETE": lambda path: flip(path / "COMPLETE", 0),
    "last byte of COMPLETE": lambda path: flip(path / "COMPLETE", -1),
    "byte of the digest": lambda path: flip(path / "COMPLETE", -9),
    "empty small files": lambda path: [
        (path / name).write_text("") for name in ("COMPLETE", "index.json")
    ],
    "no range": lambda path: edit(path, lambda entry: entry["pieces"].clear()),
    "a range twice": lambda path: edit(path, lambda entry: entry["pieces"].extend(entry["pieces"])),
    "a late range": lambda path: edit(path, lambda e: e.update(pieces=[[RANK_FILE, 1, 5]])),
    "a range elsewhere": lambda path: edit(
        path, lambda e: e.update(pieces=[["../other", 0, *e["pieces"][0][2:]]])
    ),
    "another type": lambda path: edit(path, lambda entry: entry.update(dtype="torch.int64")),
    "another form": lambda path: reseal(path, tensors=[1]),
    "not finished": lambda path: path.rename(path.with_name(path.name + ".partial")),
}


REASONS = {
    "no COMPLETE": "COMPLETE is missing",
    "no index": "index.json is missing",
    "no rank file": f"{RANK_FILE} is missing",
    "truncated rank file": f"{RANK_FILE}: its SHA-256 is not the one in index.json",
    "byte of a header": f"{RANK_FILE}: its SHA-256 is not the one in index.json",
    "byte of a tensor": f"{RANK_FILE}: its SHA-256 is not the one in index.json",
    "no range": "ends after 0 of its numbers",
    "a range twice": "is not whole at number",
    "a late range": f"is not whole at number 0 ({RANK_FILE})",
    "a range elsewhere": "is not whole at number 0 (../other)",
    "another type": "is not what index.json says",
    "another form": "index.json is none",
    "not finished": "was not written to its end",
}


def damages(bench: Bench, top: Path) -> dict[str, Resumed]:
    """Damage the newer of two checkpoints in every way."""
    pristine = bench.at(top / "pristine")
    pristine.write(1)
    pristine.write(2)
    found = {"nothing": bench.at(pristine.folder).resume()}
    for i, (name, damage) in enumerate(DAMAGES.items()):
        copied = bench.at(Path(shutil.copytree(pristine.folder, top / f"damaged-{i}")))
        damage(copied.path(2))
        found[name] = copied.resume()
    return found


def seals(bench: Bench, top: Path) -> dict[str, Resumed]:
    """Flip bits in every place of the only checkpoint's COMPLETE."""
    only = bench.at(top / "seals")
    only.write(3)
    seal = only.path(3) / "COMPLETE"
    whole, found = seal.read_bytes(), {}
    beginning = whole.index(b'"index"') + 12
    for position in (*range(beginning), len(whole) - 3, len(whole) - 2):
        for bit in (0x01, 0x08, 0x80):
            flip(seal, position, bit)
            found[f"{position} ^ {bit:#x}: {seal.read_bytes()!r}"] = only.resume()
            seal.write_bytes(whole)
    return found


def refusals(bench: Bench, world: World, top: Path) -> dict[str, Resumed]:
    """Resume what must not be resumed."""
    empty, used = bench.at(top / "empty"), bench.at(top / "used")
    used.write(4)
    only_damaged = bench.at(Path(shutil.copytree(used.folder, top / "only-damaged")))
    flip(only_damaged.path(4) / RANK_FILE, -5)
    newer = bench.at(Path(shutil.copytree(used.folder, top / "newer")))
    reseal(newer.path(4), version=99)
    other: dict[str, Any] = {
        "seed": 0,
        "model": {"layers": 2},
        "objective": {"guidance": 0.8, "shares": {"fake": 1.0, "jump": 2.0}},
    }
    sizes = {
        "wider": replace(SIZE, heads=2),
        "deeper": replace(SIZE, layers=3),
        "shallower": replace(SIZE, layers=1),
    }
    trial = Trial.of(8, objective=OWN_TEACHER)
    found = {
        name: Bench(trial.shard(world, size=size), world, used.folder).resume()
        for name, size in sizes.items()
    }
    averaged = Bench(Trial.of(8).shard(world), world, used.folder)
    return found | {
        "none": empty.resume(),
        "none must": empty.resume(must=True),
        "only damaged must": only_damaged.resume(must=True),
        "newer format": newer.resume(),
        "other run": used.at(used.folder, identity=other).resume(),
        "same run": used.resume(must=True),
        "average": averaged.resume(),
    }


def keeping(bench: Bench, top: Path) -> dict[str, Any]:
    """Write more checkpoints than are kept, and where damaged ones are."""
    few = bench.at(top / "few", keep=2)
    listed = []
    for step in (5, 10, 15, 20):
        few.write(step)
        listed.append(few.steps())
    saves, file = few.saves, few.path(20) / RANK_FILE
    assert saves.resume()
    times = [file.stat().st_mtime_ns]
    for _ in range(2):
        saves.write()
        saves.finish()
        times.append(file.stat().st_mtime_ns)
    few.progress.step = 25
    saves.write()
    saves.finish()
    file = few.path(25) / RANK_FILE
    times_new = [file.stat().st_mtime_ns]
    saves.write()
    saves.finish()
    times_new.append(file.stat().st_mtime_ns)
    found: dict[str, Any] = {
        "listed": listed,
        "untouched": (len(set(times)), len(set(times_new))) == (1, 1),
    }

    again = bench.at(top / "again")
    again.write(1)
    again.write(2)
    flip(again.path(2) / RANK_FILE, -5)
    again.resume()
    again.write(2, value=22)
    found["written again"] = again.resume()

    one = bench.at(top / "one", keep=1)
    one.write(1)
    Bench(one.engine, one.world, one.folder).write(3)
    flip(one.path(3) / RANK_FILE, -5)
    one.resume()
    one.write(2)
    found["beside a damaged newer one"] = one.resume()

    late = bench.at(top / "late")
    late.write(1)
    late.path(2).with_name("step-00000002.partial").mkdir()
    (late.folder / "step-00000002.partial" / RANK_FILE).write_bytes(b"half")
    late.write(2)
    found["over half a write"] = (late.steps(), late.resume())
    return found


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def malice(bench: Bench, top: Path) -> dict[str, Any]:
    """Put pickles in the place of every file, with digests that fit."""
    good = bench.at(top / "good")
    good.write(6)
    mark = top / "executed"
    torch.save(Bomb(mark), top / "zip")
    payloads = {"pickle": pickle.dumps(Bomb(mark)), "zip": (top / "zip").read_bytes()}
    found: dict[str, Any] = {}
    for form, payload in payloads.items():
        for name in (RANK_FILE, "index.json", "COMPLETE", ".metadata", "rank-00000.pt"):
            bad = bench.at(Path(shutil.copytree(good.folder, top / f"bad-{form}-{name}")))
            (bad.path(6) / name).write_bytes(payload)
            if name == RANK_FILE:
                reseal(bad.path(6))
            found[f"{form} as {name}"] = bad.resume()
    found["executed"] = mark.exists()
    # Or the check above says nothing.
    pickle.loads(payloads["pickle"])  # noqa: S301 - our own
    found["would execute"] = mark.exists()
    return found


def deaths(bench: Bench, top: Path) -> dict[str, Any]:
    """Kill a process at 24 moments while it does nothing but write checkpoints."""
    found, halves, reached = [], 0, set()
    for kill in range(24):
        run = bench.at(top / f"killed-{kill}", keep=2)
        run.write(1)
        child = os.fork()
        if not child:
            try:
                for step in range(2, 1000):
                    run.write(step)
            finally:
                os._exit(1)
        time.sleep(0.004 + 0.0037 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halves += sum(name.endswith(".partial") for name in run.steps())
        resumed = run.resume(must=True)
        reached.add(resumed.step)
        later = resumed.step + 1
        run.write(later, value=0.5)
        found.append((resumed.is_whole(resumed.step), run.resume().is_whole(later, 0.5)))
    return {"found": found, "halves": halves, "reached": reached}


def everything(world: World, top: Path) -> dict[str, Any]:
    """Go through all mishaps with one engine."""
    engine = Trial.of(8, objective=OWN_TEACHER).shard(world)
    bench = Bench(engine, world, top / "unused")
    return {
        "damages": damages(bench, top),
        "seals": seals(bench, top),
        "refusals": refusals(bench, world, top),
        "keeping": keeping(bench, top),
        "malice": malice(bench, top),
        "deaths": deaths(bench, top),
    }


def one_file_of_two(world: World, top: Path) -> dict[str, Resumed]:
    """Damage what only one of two ranks looks at, or reads."""
    engine = Trial.of(4, objective=OWN_TEACHER).shard(world)
    found = {}
    for name in (RANK_FILE, "rank-00001.safetensors"):
        bench = Bench(engine, world, top / name)
        bench.write(1)
        bench.write(2)
        if world.main:
            flip(bench.path(2) / name, -5)
        world.barrier()
        found[name] = bench.resume()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    top = tmp_path_factory.mktemp("mishaps")
    found: list[dict[str, Any]] = spawn(everything, 1, top, timeout_seconds=500)
    return found[0]


def test_the_newest_whole_checkpoint_is_resumed(found: dict[str, Any]) -> None:
    assert found["damages"]["nothing"].is_whole(2)
    assert found["damages"]["nothing"].warnings == []


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    found: dict[str, Any], damage: str
) -> None:
    resumed = found["damages"][damage]
    assert resumed.is_whole(1), resumed
    (warning,) = resumed.warnings
    assert "step-00000002" in warning
    assert REASONS.get(damage, "index.json is not the one that COMPLETE belongs to") in warning


def test_no_flipped_bit_in_a_seal_goes_unseen_or_stops_a_run(found: dict[str, Any]) -> None:
    wrong = {
        place: resumed.error or f"resumed step {resumed.step}"
        for place, resumed in found["seals"].items()
        if resumed.error or resumed.found
    }
    assert len(found["seals"]) > 60
    assert wrong == {}


def test_damage_that_one_rank_sees_is_seen_by_all(tmp_path: Path) -> None:
    main, other = spawn(one_file_of_two, 2, tmp_path, timeout_seconds=300)
    for name in (RANK_FILE, "rank-00001.safetensors"):
        assert main[name].is_whole(1), main[name]
        assert other[name].is_whole(1), other[name]
        assert f"step-00000002/{name}: its SHA-256" in main[name].warnings[0]
        assert other[name].warnings == []  # one speaks for all


def test_without_a_checkpoint_a_run_starts_unless_it_must_not(found: dict[str, Any]) -> None:
    none, must = found["refusals"]["none"], found["refusals"]["none must"]
    assert (none.found, none.error, none.step, none.values) == (False, "", 0, (-1.0, -1.0))
    assert must.error.startswith("UserError: resume=must")
    assert "empty" in must.error
    damaged = found["refusals"]["only damaged must"]
    assert damaged.error.startswith("UserError: resume=must")
    assert "step-00000004" in damaged.warnings[0]


def test_a_run_that_is_defined_otherwise_is_refused_by_its_keys(found: dict[str, Any]) -> None:
    assert found["refusals"]["same run"].is_whole(4)
    refused = found["refusals"]["other run"]
    assert refused.error.startswith("UserError: ")
    for named in (
        "step-00000004",
        "objective.guidance (0.5 -> 0.8)",
        "objective.shares.jump (None -> 2.0)",
    ):
        assert named in refused.error
    assert "fake" not in refused.error
    assert "seed" not in refused.error
    assert (refused.step, refused.values) == (0, (-1.0, -1.0))


OTHERS = {
    "wider": "of another shape: ",
    "deeper": "tensors that it lacks: ",
    "shallower": "tensors too many: ",
    "average": "81 tensors that it lacks: average/",
}


@pytest.mark.parametrize("other", list(OTHERS))
def test_a_checkpoint_of_another_model_is_refused(found: dict[str, Any], other: str) -> None:
    refused = found["refusals"][other]
    assert refused.error.startswith("UserError: ")
    assert "step-00000004 is a checkpoint of another model" in refused.error
    assert OTHERS[other] in refused.error
    assert refused.error.count("/") < 40  # ten names of a kind, and how many more
    assert (refused.step, refused.values) == (0, (-1.0, -1.0))


def test_a_newer_format_is_refused_by_number(found: dict[str, Any]) -> None:
    refused = found["refusals"]["newer format"]
    assert refused.error.startswith("UserError: ")
    assert "99" in refused.error


def test_the_newest_are_kept_and_no_others(found: dict[str, Any]) -> None:
    names = {step: f"step-{step:08d}" for step in (5, 10, 15, 20)}
    assert found["keeping"]["listed"] == [
        [names[5]],
        [names[5], names[10]],
        [names[10], names[15]],
        [names[15], names[20]],
    ]


def test_the_step_last_saved_or_resumed_is_not_written_again(found: dict[str, Any]) -> None:
    assert found["keeping"]["untouched"]


def test_a_damaged_step_is_written_again_when_it_is_reached(found: dict[str, Any]) -> None:
    assert found["keeping"]["written again"].is_whole(2, 22)


def test_a_damaged_newer_checkpoint_costs_no_whole_one(found: dict[str, Any]) -> None:
    assert found["keeping"]["beside a damaged newer one"].is_whole(2)


def test_half_a_write_is_written_over(found: dict[str, Any]) -> None:
    steps, resumed = found["keeping"]["over half a write"]
    assert steps == ["step-00000001", "step-00000002"]
    assert resumed.is_whole(2)


def test_nothing_that_is_read_is_unpickled(found: dict[str, Any]) -> None:
    assert found["malice"]["would execute"]
    assert not found["malice"]["executed"]
    for form in ("pickle", "zip"):
        for name in (RANK_FILE, "index.json", "COMPLETE"):
            refused = found["malice"][f"{form} as {name}"]
            assert (refused.found, refused.error) == (False, "")
            (warning,) = refused.warnings
            assert "damaged" in warning
            assert name != RANK_FILE or "is no safetensors file" in warning
        for name in (".metadata", "rank-00000.pt"):
            assert found["malice"][f"{form} as {name}"].is_whole(6)


def test_a_killed_write_leaves_an_older_checkpoint_and_a_run_that_can_save(
    found: dict[str, Any],
) -> None:
    assert found["deaths"]["found"] == [(True, True)] * 24
    assert len(found["deaths"]["reached"]) > 1, "every kill came before the first write's end"
