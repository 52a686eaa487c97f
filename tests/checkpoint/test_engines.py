"""What goes wrong with checkpoints ends alike with either engine, on two ranks.

Two processes go through all of it with each engine; the tests look at what came out.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.checkpoint.test_mishaps import Bench, Resumed, flip
from tests.checkpoint.tools import Listener, steps_in
from tests.engines.test_zero3 import zero3
from tests.engines.tools import BATCH, SIZE, Trial, fingerprint, fsdp2, objective
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.engines.base import Engine
from twinflow_train.errors import UserError

ENGINES: dict[str, Engine] = {"fsdp2": fsdp2(), "zero3": zero3()}
FILES = ("COMPLETE", "index.json", "rank-00000.safetensors", "rank-00001.safetensors")
NOBODY = 65534


@dataclass(kw_only=True)
class Failed:
    """How a save failed: what was raised in the end, what was warned of, and which steps stayed."""

    error: str
    heard: list[str]
    left: list[int]


@dataclass(kw_only=True)
class Found:
    """What one rank found out with one engine.

    full, forbidden: a save that failed. retried: whether the next one came back bit for bit.
    readable: a resume from where nothing could be written. later: one from there after a save.
    """

    flipped: dict[str, Resumed]
    others: dict[str, Resumed]
    full: Failed
    retried: bool
    forbidden: Failed
    readable: Resumed
    later: Resumed


def everything(world: World, top: Path, public: Path) -> dict[str, Found]:
    """Go through all mishaps with each engine."""
    return {name: mishaps(world, ENGINES[name], top / name, public / name) for name in ENGINES}


def mishaps(world: World, engine: Engine, top: Path, public: Path) -> Found:
    trial = Trial.of(4, engine=engine)
    bench = Bench(trial.shard(world), world, top / "whole")
    bench.write(1)
    bench.write(2)
    full, retried = a_full_disk(trial, world, top / "full")
    forbidden, readable, later = a_read_only_folder(bench.at(public))
    return Found(
        flipped={file: flipped(bench, file) for file in FILES},
        others=others(trial, world, bench.folder),
        full=full,
        retried=retried,
        forbidden=forbidden,
        readable=readable,
        later=later,
    )


def flipped(bench: Bench, file: str) -> Resumed:
    """Flip a bit of one file of the newer checkpoint, and resume."""
    copied = bench.at(bench.folder.with_name(file))
    if bench.world.main:
        shutil.copytree(bench.folder, copied.folder)
        flip(copied.path(2) / file, -5)
    bench.world.barrier()
    return copied.resume()


def others(trial: Trial, world: World, folder: Path) -> dict[str, Resumed]:
    """Resume the checkpoint with other models."""
    sizes = {
        "wider": replace(SIZE, heads=2),
        "deeper": replace(SIZE, layers=3),
        "shallower": replace(SIZE, layers=1),
    }
    engines = {name: trial.shard(world, size=size) for name, size in sizes.items()}
    own_teacher = replace(trial, objective=objective(teacher_decay=0.0))
    engines["without average"] = own_teacher.shard(world)
    return {name: Bench(engine, world, folder).resume() for name, engine in engines.items()}


def a_full_disk(trial: Trial, world: World, folder: Path) -> tuple[Failed, bool]:
    """Train and save at every step; the second time there is no room for one rank's file."""
    bench = Bench(trial.shard(world), world, folder)
    saves = bench.saves

    def learn() -> None:
        trial.learn(bench.engine, bench.progress.step, world)
        bench.progress.advance(BATCH)

    learn()
    saves.write()
    saves.finish()
    learn()
    with Listener() as listener, no_room() if world.rank else nullcontext():
        saves.write()
        learn()
        with pytest.raises(UserError) as raised:
            saves.finish()
    failed = Failed(error=str(raised.value), heard=listener.heard, left=steps_in(folder))
    world.barrier()  # else another rank may be saving again already
    saves.write()
    saves.finish()
    again = Bench(trial.shard(world, seed=99), world, folder)
    assert again.saves.resume(must=True)
    same = fingerprint(again.engine) == fingerprint(bench.engine)
    return failed, same and again.progress == bench.progress


def a_read_only_folder(bench: Bench) -> tuple[Failed, Resumed, Resumed]:
    """Save, save where nothing can be written any more, resume there, and save again."""
    bench.write(1)
    with read_only(bench.folder, bench.world), Listener() as listener:
        with pytest.raises(UserError) as raised:
            bench.write(2)
        left = steps_in(bench.folder)
        readable = bench.resume()
    failed = Failed(error=str(raised.value), heard=listener.heard, left=left)
    bench.write(2)
    return failed, readable, bench.resume()


@contextmanager
def no_room() -> Iterator[None]:
    """Let no file of this process be as long as it has to be."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@contextmanager
def read_only(folder: Path, world: World) -> Iterator[None]:
    """Let no rank write into a folder, be it the superuser's."""
    if world.main:
        folder.chmod(0o555)
    world.barrier()
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        world.barrier()
        if world.main:
            folder.chmod(0o755)
        world.barrier()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    with tempfile.TemporaryDirectory() as public, pytest.MonkeyPatch.context() as env:
        Path(public).chmod(0o755)  # pytest's own folders are closed to others
        env.setenv("TWINFLOW_TYPE_HOOK", "0")  # shapes are checked where the engines are tested
        top = tmp_path_factory.mktemp("mishaps")
        return spawn(everything, 2, top, Path(public), timeout_seconds=500)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_in_any_file_costs_one_checkpoint(
    found: list[dict[str, Found]], engine: str, file: str
) -> None:
    main, other = (rank[engine].flipped[file] for rank in found)
    assert main.is_whole(1), main
    assert other.is_whole(1), other
    (warning,) = main.warnings
    assert "step-00000002" in warning
    assert (file if file.startswith("rank") else "index.json") in warning
    assert other.warnings == []  # one speaks for all


WRONG = {
    "wider": "of another shape: ",
    "deeper": "that it lacks: ",
    "shallower": "too many: ",
    "without average": "too many: average/",
}


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("other", list(WRONG))
def test_another_model_is_refused_with_at_most_ten_names(
    found: list[dict[str, Found]], engine: str, other: str
) -> None:
    main, second = (rank[engine].others[other] for rank in found)
    assert main.error == second.error
    assert main.error.startswith("UserError: ")
    assert "step-00000002 is a checkpoint of another model" in main.error
    assert WRONG[other] in main.error
    said = main.error.partition("it has ")[2].split("; ")
    for text in said:
        told = LISTED.fullmatch(text)
        assert told is not None
        count, names, more = told.groups()
        assert len(re.findall(r"[a-z_]+/[\w.]+", names)) == min(int(count), 10)
        assert int(more or 0) == max(int(count) - 10, 0)
    for rank in (main, second):
        assert (rank.found, rank.step, rank.values) == (False, 0, (-1.0, -1.0))


LISTED = re.compile(r"(\d+) tensors [a-z ]+: (.*?)(?: and (\d+) more)?")
"""How many tensors are wrong, the names of some, and how many more there are."""


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_full_disk_costs_one_save_a_warning_and_no_training(
    found: list[dict[str, Found]], engine: str
) -> None:
    main, other = (rank[engine] for rank in found)
    (warning,) = main.full.heard
    assert warning.startswith("step 2 was NOT saved: ")
    assert "step-00000002.partial: File too large (rank 1)" in warning
    assert other.full.heard == []
    for rank in (main, other):
        assert rank.full.error.startswith("the last save failed: ")
        assert rank.full.left == [1]
        assert rank.retried


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_folder_that_becomes_read_only_costs_one_save_and_can_be_resumed(
    found: list[dict[str, Found]], engine: str
) -> None:
    main, other = (rank[engine] for rank in found)
    (warning,) = main.forbidden.heard
    assert warning.startswith("step 2 was NOT saved: ")
    assert "step-00000002.partial: Permission denied (rank 0)" in warning
    for rank in (main, other):
        assert "Permission denied" in rank.forbidden.error
        assert rank.forbidden.left == [1]
        assert rank.readable.is_whole(1)
        assert rank.later.is_whole(2)
