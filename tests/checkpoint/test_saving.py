"""Saving beside the training: it stands still only to be copied, and a failure costs nothing."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.checkpoint.tools import ALONE, RANK_FILE, SHAPES, Listener, Plain, Plainly, steps_in
from tests.helpers import RankError, spawn
from twinflow_train.checkpoint.copying import HostCopy
from twinflow_train.checkpoint.inspecting import look
from twinflow_train.checkpoint.saving import Keep
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.place import Place

LARGE = {"model/a": (100, 100)}


class ForeignError(Exception):
    """What a driver's own library raises."""


class Gated(MemoryFileSystem):
    """A remote store whose weights wait at a gate, and may fail there."""

    protocol = "gated"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    gate = threading.Event()
    error: ClassVar[Exception | None] = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("gated://")))

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if mode == "wb" and "rank-" in path:
            assert self.gate.wait(30)
            if self.error is not None:
                raise self.error
        return super()._open(path, mode, **settings)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """The gate of gated://, closed."""
    fsspec.register_implementation("gated", Gated, clobber=True)
    Gated.store.clear()
    Gated.pseudo_dirs[:] = [""]
    Gated.gate.clear()
    Gated.error = None
    yield Gated.gate
    Gated.gate.set()


def whole(folder: Path | str) -> dict[int, bool]:
    """Tell of each step with a folder of its own whether every byte of it is right."""
    top = Place.of(folder)
    return {
        int(name[5:]): not look(top / name, bytewise=True).fault
        for name in top.names()
        if name[5:].isdigit()
    }


# Beside the training


def test_what_changes_after_the_copy_is_not_saved(gate: threading.Event) -> None:
    run = Plainly.open("gated://a")
    run.go(1)
    run.saves.write()
    run.state.fill(99)
    assert run.saves.figures().keys() == {"time/save_stall"}  # it is still under way
    gate.set()
    run.saves.finish()
    assert run.saves.figures().keys() == {"time/save_stall", "time/save"}
    again = Plainly.open("gated://a")
    assert again.saves.resume()
    assert again.state.values() == {1.0}


def test_a_save_waits_for_the_one_before(gate: threading.Event) -> None:
    run = Plainly.open("gated://a")
    run.go(1)
    run.saves.write()
    assert run.saves.figures()["time/save_stall"] < 0.2
    run.go(2)
    threading.Timer(0.3, gate.set).start()
    run.saves.write()
    assert 0.25 < run.saves.figures()["time/save_stall"] < 5
    run.saves.finish()
    assert whole("gated://a") == {1: True, 2: True}


def test_what_is_under_way_is_no_checkpoint(gate: threading.Event) -> None:
    run = Plainly.open("gated://a")
    run.go(1)
    run.saves.write()
    while "/a/step-00000001" not in Gated.pseudo_dirs:
        time.sleep(0.01)
    with Listener() as listener:
        assert not Plainly.open("gated://a").saves.resume()
    (warning,) = listener.heard
    assert "index.json is missing" in warning
    gate.set()
    run.saves.finish()
    assert Plainly.open("gated://a").saves.resume()


def test_the_seconds_of_a_save_are_of_the_clock(gate: threading.Event) -> None:
    run = Plainly.open("gated://a")
    run.go(1)
    threading.Timer(0.3, gate.set).start()
    run.saves.write()
    run.saves.finish()
    figures = run.saves.figures()
    assert figures["time/save_stall"] < 0.2 < figures["time/save"] < 5


@pytest.mark.parametrize("ends", [KeyError, UserError, SystemExit])
def test_whatever_ends_a_run_what_is_under_way_gets_to_the_disk(
    gate: threading.Event, ends: type[BaseException]
) -> None:
    run = Plainly.open("gated://a")
    run.go(1)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(ends):
        write_and_raise(run, ends)
    assert whole("gated://a") == {1: True}


def test_a_second_ctrl_c_does_not_wait(gate: threading.Event) -> None:
    run = Plainly.open("gated://a")
    run.go(1)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(run, KeyboardInterrupt)
    assert time.monotonic() - began < 5
    assert not gate.is_set()


def write_and_raise(run: Plainly, kind: type[BaseException]) -> None:
    with run.saves:
        run.saves.write()
        raise kind


def one_rank_raises(world: World, folder: Path) -> None:
    run = Plainly.open(folder, world, shapes=LARGE)
    run.go(1)
    with run.saves:
        run.saves.write()
        if world.rank == 1:
            raise KeyError("only here")
        world.barrier()


def test_what_one_rank_raises_costs_no_save_of_all(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="only here"):
        spawn(one_rank_raises, 2, tmp_path)
    assert whole(tmp_path) == {1: True}


def test_no_collective_of_the_training_meets_one_of_a_save(tmp_path: Path) -> None:
    for rank in spawn(talk_while_saving, 2, tmp_path):
        assert rank == [1.0] * 300
    assert set(whole(tmp_path).values()) == {True}


def talk_while_saving(world: World, folder: Path) -> list[float]:
    run = Plainly.open(folder, world, keep=99)
    said = []
    with run.saves:
        for step in range(1, 301):
            if step % 3 == 0:
                run.go(step)
                run.saves.write()
            said.append(float(world.sum(torch.tensor(0.5))))
    return said


# What stays


def test_the_start_needs_no_checkpoint(tmp_path: Path) -> None:
    run = Plainly.open(tmp_path)
    run.saves.write()
    run.saves.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_the_newest_stay_and_every_so_many(tmp_path: Path, where: str) -> None:
    top = tmp_path if where == "disk" else f"memory:/{tmp_path}"
    run = Plainly.open(top, keep=2, keep_every=20)
    run.save(*range(5, 56, 5))
    assert list(whole(top)) == [20, 40, 50, 55]


def test_old_is_what_is_neither_new_nor_to_be_kept() -> None:
    assert Keep(newest=2).old([5, 1, 3, 9]) == [1, 3]
    assert Keep(newest=1, every=3).old([1, 3, 5, 6, 9, 10]) == [1, 5]
    assert Keep(newest=9, every=3).old([1, 3]) == []


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    names = ["notes.txt", "step-00000001-copy", "step-1", "best.partial"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002.partial").mkdir()
    Plainly.open(tmp_path, keep=1).save(1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "step-00000003"])


def test_files_of_an_attempt_with_more_ranks_are_cleared(tmp_path: Path) -> None:
    half = tmp_path / "step-00000004.partial"
    half.mkdir()
    (half / "rank-00007.safetensors").write_bytes(b"of another time")
    Plainly.open(tmp_path).save(4)
    names = sorted(path.name for path in (tmp_path / "step-00000004").iterdir())
    assert names == ["COMPLETE", "index.json", RANK_FILE]


# What fails


def a_full_disk(world: World, folder: Path, limited: int) -> dict[str, Any]:
    """Save three times; the second time no file of one rank may be as long as it has to be."""
    run = Plainly.open(folder, world, shapes=LARGE, keep=1)
    with Listener() as listener, run.saves:
        run.save(1)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
        run.go(2)
        run.saves.write()
        error = ""
        try:
            run.saves.finish()
        except UserError as raised:
            error = str(raised)
        world.barrier()
        left = sorted(path.name for path in folder.iterdir())
        world.barrier()  # else another rank may be saving again already
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        run.go(3)
        run.saves.write()
        run.saves.finish()
        world.barrier()
    return {"error": error, "left": left, "heard": listener.heard}


@pytest.mark.parametrize(("ranks", "limited"), [(1, 0), (2, 1)])
def test_a_full_disk_costs_one_save_and_a_warning(tmp_path: Path, ranks: int, limited: int) -> None:
    told = spawn(a_full_disk, ranks, tmp_path, limited)
    for each in told:
        assert "step-00000002.partial: File too large" in each["error"]
        assert f"(rank {limited})" in each["error"]
        assert "the last save failed" in each["error"]
        assert each["left"] == ["step-00000001"]
    (warning,) = told[0]["heard"]
    assert warning.startswith("step 2 was NOT saved: ")
    assert f"{tmp_path}/step-00000002.partial: File too large (rank {limited})" in warning
    assert [each["heard"] for each in told[1:]] == [[]] * (ranks - 1)
    assert whole(tmp_path) == {3: True}


def test_a_file_in_the_way_costs_one_save_and_a_warning(tmp_path: Path) -> None:
    top = tmp_path / "checkpoints"
    run = Plainly.open(top)
    run.save(1)
    top.rename(tmp_path / "moved")
    top.write_text("no folder")
    run.go(2)
    with Listener() as listener:
        run.saves.write()
        with pytest.raises(UserError, match=r"the last save failed.*checkpoints"):
            run.saves.finish()
    assert "step 2 was NOT saved" in listener.heard[0]
    assert sum("NOT saved" in text for text in listener.heard) == 1
    top.unlink()
    (tmp_path / "moved").rename(top)
    run.saves.write()  # the same step: it is not saved yet
    run.saves.finish()
    assert whole(top) == {1: True, 2: True}


@pytest.mark.parametrize("error", [ForeignError("no such bucket"), OSError(5, "it is gone")])
def test_a_failing_store_costs_one_save_and_a_warning(
    gate: threading.Event, error: Exception
) -> None:
    gate.set()
    run = Plainly.open("gated://a")
    run.save(1)
    Gated.error = error
    run.go(2)
    with Listener() as listener:
        run.saves.write()
        with pytest.raises(UserError, match="the last save failed"):
            run.saves.finish()
    (warning,) = listener.heard
    assert "gated://a/step-00000002: " in warning
    assert ("no such bucket" if isinstance(error, ForeignError) else "it is gone") in warning
    assert whole("gated://a") == {1: True}
    Gated.error = None
    run.save(3)
    assert whole("gated://a") == {1: True, 3: True}


def no_memory(world: World, folder: Path) -> tuple[str, list[str]]:
    run = Plainly.open(folder, world, shapes={"model/a": (75_000_000,)})
    run.go(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    room = 200_000_000
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + room, unlimited[1])
    )
    with Listener() as listener:
        run.saves.write()
        try:
            run.saves.finish()
        except UserError as error:
            return str(error), listener.heard
    return "", listener.heard


def test_without_memory_for_the_copy_a_save_fails_and_the_run_goes_on(tmp_path: Path) -> None:
    error, heard = spawn(no_memory, 1, tmp_path)[0]
    assert "no host memory for a copy of the state" in error
    assert len(heard) == 1
    assert whole(tmp_path) == {}


# The copy


@pytest.mark.parametrize("block", [16, 40, 1 << 20])
def test_a_copy_has_every_byte_over_any_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("twinflow_train.checkpoint.copying.BLOCK", block)
    run = Plainly.open(tmp_path)
    for number, span in enumerate(run.state.spans()):
        span.local.copy_(torch.arange(len(span.local)) + 100 * number)
    before = [span.local.clone() for span in run.state.spans()]
    run.progress.step = 1
    run.saves.write()
    run.saves.finish()
    run.state.fill(-1)
    assert run.saves.resume()
    after = [span.local for span in run.state.spans()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.gpu
def test_a_copy_of_a_gpu_is_of_the_moment_it_is_taken() -> None:
    state = Plain({"model/a": (5_000_000,)}, ALONE)
    (span,) = state.spans()
    on_gpu = torch.zeros(len(span.local), device="cuda")
    state._spans = [type(span)(**(vars(span) | {"local": on_gpu}))]
    copy = HostCopy(pinned=True)
    copy.reserve(state.spans())
    for value in (3.0, 4.0):
        on_gpu.fill_(value)
        copy.take(state.spans())
        on_gpu.fill_(-1.0)
        header, *body = copy.parts()
        numbers = torch.frombuffer(bytearray(b"".join(body)), dtype=torch.float32)
        assert bool((numbers == value).all())
        assert len(header) % 8 == 0


def test_the_layout_of_a_state_may_not_change(tmp_path: Path) -> None:
    run = Plainly.open(tmp_path)
    run.save(1)
    run.saves.engine = Plain(SHAPES | {"model/a": (4, 5)}, ALONE)
    run.go(2)
    with pytest.raises(AssertionError, match="layout"):
        run.saves.write()
    assert steps_in(tmp_path) == [1]
