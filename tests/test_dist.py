"""World's verbs over real processes, and that `spawn` tells the truth about them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from tests import helpers, typing_hook
from tests.helpers import RankError, spawn
from twinflow_train import dist
from twinflow_train.dist import World


def verbs(world: World, offset: int) -> dict[str, object]:
    rank = world.rank
    return {
        "who": (rank, world.size, world.main, world.device.type),
        "sum": world.sum(torch.tensor([1.0 + rank, offset])),
        "gather": world.gather(torch.tensor([rank, offset])),
        "any": (world.any(rank == 1), world.any(False), world.any(True)),
        "texts": list(world.gather_texts("" if rank == 0 else "z\u00e4hlen " * rank)),
        "threads": torch.get_num_threads(),
    }


def one_is_told_to_stop(world: World) -> tuple[bool, bool]:
    before = dist.stopping(world)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    world.barrier()
    return before, dist.stopping(world)


def rank_one_fails(world: World) -> None:
    if world.rank == 1:
        raise KeyError("the broken one")
    world.barrier()


def rank_one_hangs(world: World) -> None:
    if world.rank == 1:
        time.sleep(600)


def rank_one_vanishes(world: World) -> None:
    if world.rank == 1:
        os._exit(7)
    time.sleep(600)


def hang(world: World, folder: Path, how: str) -> None:
    """Hang in a way that is hard to end."""
    (folder / f"{world.rank}").write_text(str(os.getpid()))
    if how == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if how == "untold":
        os.kill(os.getppid(), signal.SIGSTOP)  # who is to tell how this process ended
    time.sleep(600)


def wrong_type(world: World) -> None:
    world.gather_texts(3)  # type: ignore[arg-type]


def test_verbs_agree_on_every_rank() -> None:
    results = spawn(verbs, 2, 5)
    for rank, result in enumerate(results):
        assert result["who"] == (rank, 2, rank == 0, "cpu")
        assert result["sum"].tolist() == [3, 10]
        assert result["gather"].tolist() == [[0, 5], [1, 5]]
        assert result["any"] == (True, False, True)
        assert result["texts"] == ["", "z\u00e4hlen "]
        assert result["threads"] == 1


def test_a_world_of_one_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with dist.start() as world:
            device = world.device
            assert (world.rank, world.size, world.main) == (0, 1, True)
            assert world.sum(torch.ones(2, device=device)).tolist() == [1, 1]
            assert world.gather(torch.ones(2, device=device)).tolist() == [[1, 1]]
            assert list(world.gather_texts("one")) == ["one"]
            assert not dist.stopping(world)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def test_a_signal_to_one_rank_stops_all() -> None:
    assert spawn(one_is_told_to_stop, 2) == [(False, True)] * 2


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*rank_one_fails.*the broken one"):
        spawn(rank_one_fails, 2)


def test_a_hang_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"1\] did not end in 3 seconds"):
        spawn(rank_one_hangs, 2, timeout_seconds=3)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("how", ["deaf", "untold"])
def test_no_hang_outlives_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(helpers, "GRACE_SECONDS", 1)
    spawn(verbs, 1, 0)  # the server is there
    began = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not end in 8 seconds"):
        spawn(hang, 2, tmp_path, how, timeout_seconds=8)
    assert 8 < time.monotonic() - began < 14
    pids = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert pids.keys() == {"0", "1"}
    assert not [rank for rank, pid in pids.items() if lives(pid)]
    assert spawn(verbs, 1, 0)[0]["any"] == (False, False, True)


def lives(pid: int) -> bool:
    """Tell whether there is such a process that is not dead."""
    stat = Path("/proc", str(pid), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_server_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "GRACE_SECONDS", 1)
    spawn(verbs, 1, 0)
    server = helpers._server()
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0\] did not end in 2 seconds"):
        spawn(verbs, 1, 0, timeout_seconds=2)
    assert 2 < time.monotonic() - began < 8
    assert spawn(verbs, 1, 0)[0]["any"] == (False, False, True)
    assert not server.alive


def test_a_vanished_rank_is_noticed() -> None:
    with pytest.raises(RankError, match="rank 1 ended with exit code 7"):
        spawn(rank_one_vanishes, 2, timeout_seconds=60)


@pytest.mark.skipif(not typing_hook.ACTIVE, reason="the type hook is switched off")
def test_spawned_processes_check_types_too() -> None:
    with pytest.raises(RankError, match="BeartypeCallHintParamViolation"):
        spawn(wrong_type, 1)


def test_processes_that_are_started_again_do_not_meet_the_dead() -> None:
    """With the store that torchrun keeps, and rank 0 the last to come."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    seen: list[set[str]] = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(met, server.port, rank, 3, 0.2 * (rank == 0)) for rank in range(3)]
            seen.append({each.result() for each in found})
    assert [len(each) for each in seen] == [1, 1, 1]
    assert len(set.union(*seen)) == 3


def met(port: int, rank: int, size: int, late_seconds: float) -> str:
    """Meet the others, and return what rank 0 says to them."""
    time.sleep(late_seconds)
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20))
    part = dist.meet(store, rank=rank, size=size, patience_seconds=20)
    if rank == 0:
        part.set("word", str(time.monotonic_ns()))
    return part.get("word").decode()


def test_a_rank_that_does_not_come_is_named() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come in 0.2 s"):
        dist.meet(server, rank=0, size=3, patience_seconds=0.2)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] did not come in 0.2 s"):
        dist.meet(server, rank=2, size=3, patience_seconds=0.2)


@pytest.mark.parametrize("rank", [0, 1])
def test_asked_to_stop_a_rank_does_not_wait_for_those_that_died_of_it(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(dist, "ASKED_SECONDS", 0.3)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(dist.meet, server, rank=rank, size=2, patience_seconds=60)
        time.sleep(0.5)
        assert not found.done()
        monkeypatch.setattr(dist._Stop, "asked", True)
        with pytest.raises(TimeoutError, match="did not come before this one was asked to stop"):
            found.result(10)


ENDING = """
import os, signal
from twinflow_train import dist


class Late:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, signal.SIGUSR1)
        kill(me, signal.SIGTERM)


late = Late()  # it goes when the interpreter has given signals their default back
dist.watch_signals()
dist.ignore_signals()
raise SystemExit(75)
"""


def test_asked_again_at_its_very_end_a_process_keeps_its_code() -> None:
    assert subprocess.run([sys.executable, "-c", ENDING]).returncode == 75
