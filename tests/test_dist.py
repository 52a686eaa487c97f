"""World's verbs over real processes, and that `spawn` tells the truth about them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from tests import typing_hook
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


def test_a_vanished_rank_is_noticed() -> None:
    with pytest.raises(RankError, match="rank 1 ended with exit code 7"):
        spawn(rank_one_vanishes, 2, timeout_seconds=60)


@pytest.mark.skipif(not typing_hook.ACTIVE, reason="the type hook is switched off")
def test_spawned_processes_check_types_too() -> None:
    with pytest.raises(RankError, match="BeartypeCallHintParamViolation"):
        spawn(wrong_type, 1)
