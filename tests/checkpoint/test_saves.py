"""A run cannot be lost: saved on any number of ranks, it goes on exactly on any other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.tools import IDENTITY, Part, assembled, state_of
from tests.engines.tools import BATCH, State, Trial, fingerprint, whole
from tests.helpers import spawn
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded

Pair = tuple[float, float]
SAVED = 2
END = 4
TRIAL = Trial.of(2)


@dataclass(kw_only=True)
class Life:
    """How a run went on from its checkpoint: the state there, later losses, the state at the end.

    bits: a hash of this rank's state at the end. model: whole weights at the end, on rank 0.
    """

    there: Part
    went: list[Pair]
    bits: str
    model: State


@dataclass(kw_only=True)
class Told:
    """What one rank tells: of its own run, and of those that it resumed, by their ranks."""

    own: Life | None = None
    resumed: dict[int, Life] = field(default_factory=dict)


def checkpoints(
    folder: Path, engine: Sharded, progress: Progress, world: World, **settings: Any
) -> Checkpoints:
    return Checkpoints(
        **({"identity": IDENTITY} | settings),
        folder=folder,
        engine=engine,
        progress=progress,
        world=world,
    )


def go_on(engine: Sharded, progress: Progress, world: World, *, until: int) -> list[Pair]:
    went = []
    while progress.step < until:
        went.append(TRIAL.learn(engine, progress.step, world))
        progress.advance(BATCH)
    return went


def live(world: World, top: Path, *, write: bool, resume: list[int]) -> Told:
    """Train, save and train on; then resume the runs of these numbers of ranks."""
    told = Told()
    if write:
        engine, progress = TRIAL.shard(world), Progress()
        go_on(engine, progress, world, until=SAVED)
        there = state_of(engine, progress)
        saves = checkpoints(top / str(world.size), engine, progress, world)
        saves.write()
        told.own = live_on(engine, progress, world, there)  # while it is being written
        saves.finish()
    for ranks in resume:
        engine, progress = TRIAL.shard(world, seed=99), Progress()
        assert checkpoints(top / str(ranks), engine, progress, world).resume(must=True)
        told.resumed[ranks] = live_on(engine, progress, world, state_of(engine, progress))
    return told


def live_on(engine: Sharded, progress: Progress, world: World, there: Part) -> Life:
    went = go_on(engine, progress, world, until=END)
    return Life(there=there, went=went, bits=fingerprint(engine), model=whole(engine, "model"))


def write_and_resume(world: World, top: Path, resume: list[int]) -> Told:
    return live(world, top, write=True, resume=resume)


def only_resume(world: World, top: Path, resume: list[int]) -> Told:
    return live(world, top, write=False, resume=resume)


@dataclass(kw_only=True)
class Lives:
    """All lives: own[ranks], and resumed[ranks, on ranks], a list over ranks each."""

    top: Path
    own: dict[int, list[Life]] = field(default_factory=dict)
    resumed: dict[tuple[int, int], list[Life]] = field(default_factory=dict)

    def add(self, on: int, told: list[Told]) -> None:
        if told[0].own is not None:
            self.own[on] = [each.own for each in told if each.own is not None]
        for ranks in told[0].resumed:
            self.resumed[ranks, on] = [each.resumed[ranks] for each in told]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    found = Lives(top=tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as env:
        # Shapes are checked where the engine is tested; the checks are half of the time.
        env.setenv("TWINFLOW_TYPE_HOOK", "0")
        for on, resume in ((1, [1]), (2, [1, 2]), (4, [1, 2, 4])):
            told = spawn(write_and_resume, on, found.top, resume, timeout_seconds=300)
            found.add(on, told)
        for on, resume in ((2, [4]), (1, [2, 4])):
            told = spawn(only_resume, on, found.top, resume, timeout_seconds=300)
            found.add(on, told)
    return found


PAIRS = [(ranks, on) for ranks in (1, 2, 4) for on in (1, 2, 4)]


@pytest.mark.parametrize(("ranks", "on"), PAIRS)
def test_everything_saved_comes_back_exactly(lives: Lives, ranks: int, on: int) -> None:
    before = [life.there for life in lives.own[ranks]]
    after = [life.there for life in lives.resumed[ranks, on]]
    for part in before + after:
        assert part.updates == SAVED
        assert part.progress == (SAVED, SAVED * BATCH)
    theirs, ours = assembled(before), assembled(after)
    assert ours.keys() == theirs.keys()
    assert {key.partition("/")[0] for key in ours} == {
        "model", "average", "exp_avg", "exp_avg_sq"
    }  # fmt: skip
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert sum(int(ours[key].count_nonzero()) for key in ours if key.startswith("exp_avg/")) > 100


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_as_many_ranks_a_run_goes_on_bit_for_bit(lives: Lives, ranks: int) -> None:
    for own, resumed in zip(lives.own[ranks], lives.resumed[ranks, ranks], strict=True):
        assert resumed.went == own.went
        assert resumed.bits == own.bits


@pytest.mark.parametrize(("ranks", "on"), [(a, b) for a, b in PAIRS if a != b])
def test_on_another_number_of_ranks_a_run_goes_on_alike(lives: Lives, ranks: int, on: int) -> None:
    own = lives.own[ranks][0]
    for resumed in lives.resumed[ranks, on]:
        for (loss, norm), (their_loss, their_norm) in zip(resumed.went, own.went, strict=True):
            assert loss == pytest.approx(their_loss, rel=1e-6)
            assert norm == pytest.approx(their_norm, rel=1e-5)
    model = lives.resumed[ranks, on][0].model
    assert model.keys() == own.model.keys()
    for name, tensor in model.items():
        torch.testing.assert_close(tensor, own.model[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_is_safetensors_and_json_only(lives: Lives, ranks: int) -> None:
    (folder,) = (lives.top / str(ranks)).iterdir()
    assert folder.name == f"step-{SAVED:08d}"
    files = {path.name for path in folder.iterdir()}
    weights = {f"rank-{rank:05d}.safetensors" for rank in range(ranks)}
    assert files == weights | {"index.json", "COMPLETE"}
    for name in files:
        start = (folder / name).read_bytes()[:4]
        assert not start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    for name in ("index.json", "COMPLETE"):
        json.loads((folder / name).read_text())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_index_tells_where_every_number_is(lives: Lives, ranks: int) -> None:
    """The format of the module's docstring, read by other means."""
    (folder,) = (lives.top / str(ranks)).iterdir()
    text = (folder / "index.json").read_bytes()
    seal = json.loads((folder / "COMPLETE").read_text())
    assert seal == {"version": 1, "index": hashlib.sha256(text).hexdigest()}
    index = json.loads(text)
    there = {"step": SAVED, "samples": SAVED * BATCH}
    assert {key: index["progress"][key] for key in there} == there
    assert (index["updates"], index["run"], index["version"]) == (SAVED, IDENTITY, 1)
    for name, digest in index["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    files = {name: load_file(folder / name) for name in index["files"]}
    want = assembled([life.there for life in lives.own[ranks]])
    assert index["tensors"].keys() == want.keys()
    for key, entry in index["tensors"].items():
        flat = torch.full((torch.Size(entry["shape"]).numel(),), torch.nan)
        for file, offset, length in entry["pieces"]:
            assert files[file][key].shape == (length,)
            flat[offset : offset + length] = files[file][key]
        assert torch.equal(flat.view(entry["shape"]), want[key])
        assert entry["dtype"] == "torch.float32"


def test_progress_counts_and_knows_what_is_due() -> None:
    progress = Progress()
    assert progress.every(5)
    for _ in range(3):
        progress.advance(7)
    assert (progress.step, progress.samples) == (3, 21)
    assert [every for every in (0, 1, 2, 3, 6) if progress.every(every)] == [1, 3]
