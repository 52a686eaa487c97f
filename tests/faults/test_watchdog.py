"""A process whose step does not end is ended, says where it was, and nothing else ends it."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import RankError, spawn
from twinflow_train import dist
from twinflow_train.dist import World
from twinflow_train.faults import HUNG
from twinflow_train.faults import watchdog as module
from twinflow_train.faults.watchdog import Watchdog

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def one_does_not_come(world: World, folder: Path) -> None:
    """Wait in a collective for a rank that sleeps."""
    with Watchdog(2.0, folder=folder, world=world) as dog, dog.step():
        if world.rank == 1:
            sleep_for_ever()
        world.barrier()


def one_watches(world: World, folder: Path) -> None:
    """Wait in a collective, of which only this rank loses patience."""
    if world.rank == 1:
        sleep_for_ever()
    with Watchdog(1.0, folder=folder, world=world) as dog, dog.step():
        world.barrier()


def sleep_for_ever() -> None:
    time.sleep(600)


def dies_in_a_step(world: World, folder: Path) -> None:
    """Lose the other rank in a step."""
    with Watchdog(60.0, folder=folder, world=world) as dog, dog.step():
        if world.rank == 1:
            os._exit(0)
        world.barrier()


def takes_its_time(world: World, folder: Path) -> float:
    """Do what is not watched for longer than a step may take, between two steps."""
    began = time.monotonic()
    with Watchdog(0.5, folder=folder, world=world) as dog:
        for _ in range(2):
            with dog.step():
                world.barrier()
            time.sleep(1.5)
        with dog.waiting("data"):
            pass
    return time.monotonic() - began


def hands_the_lock_back(world: World, folder: Path) -> None:
    """Hang while another thread holds what a log needs, and with data instead of a step."""
    held = threading.Lock()
    held.acquire()
    with Watchdog(1.0, folder=folder, world=world) as dog, dog.waiting("data"):
        held.acquire()


def test_all_ranks_end_and_say_where_they_were(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=f"ended with exit code {HUNG}|rank . failed"):
        spawn(one_does_not_come, 2, tmp_path)
    assert time.monotonic() - began < 60
    stacks = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "a step did not end in 2 seconds" in stacks[0] + stacks[1]
    assert "in barrier" in stacks[0]
    assert "sleep_for_ever" in stacks[1]
    assert all("Thread 0x" in text for text in stacks)


def test_the_last_collectives_are_written_beside(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        spawn(one_watches, 2, tmp_path)
    told = pickle.loads((tmp_path / "collectives-0.pickle").read_bytes())  # noqa: S301 - our own
    assert told["entries"][-1]["profiling_name"] == "gloo:all_reduce"


def test_a_rank_that_loses_another_says_so_too(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0 failed"):
        spawn(dies_in_a_step, 2, tmp_path)
    told = (tmp_path / "rank-0.txt").read_text()
    assert "a step ended with" in told
    assert "dies_in_a_step" in told


def test_what_is_not_watched_takes_its_time(tmp_path: Path) -> None:
    assert min(spawn(takes_its_time, 2, tmp_path)) > 3
    assert not list(tmp_path.iterdir())


def test_it_ends_what_waits_for_data(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=f"exit code {HUNG}"):
        spawn(hands_the_lock_back, 1, tmp_path)
    assert "waiting for data did not end in 1 seconds" in (tmp_path / "rank-0.txt").read_text()


SUSPENDED = """
import sys, time
from pathlib import Path
import torch
from twinflow_train.dist import World
from twinflow_train.faults.watchdog import Watchdog
world = World(rank=0, size=1, device=torch.device("cpu"))
with Watchdog(3.0, folder=Path(sys.argv[1]), world=world) as dog, dog.step():
    print("began", flush=True)
    time.sleep(0.5)
print("ended")
"""


def test_time_in_which_it_was_stopped_does_not_count(tmp_path: Path) -> None:
    """As when a scheduler suspends a job, or a lid is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "ended\n"
    assert process.returncode == 0


def test_the_limit_follows_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.1)
    dog = Watchdog(600.0, folder=tmp_path, world=ALONE)
    seen = []
    for _ in range(2 * module.FIRST):
        seen.append(dog.limit)
        with dog.step():
            time.sleep(0.02)
    assert seen[: module.FIRST] == [600.0] * module.FIRST
    assert all(20 * 0.02 <= limit < 20 * 0.2 for limit in seen[module.FIRST :])


def test_the_least_and_the_most_hold_whatever_the_steps_take(tmp_path: Path) -> None:
    quick, slow = (Watchdog(each, folder=tmp_path, world=ALONE) for each in (600.0, 30.0))
    for dog in (quick, slow):
        for _ in range(module.FIRST):
            with dog.step():
                pass
    assert (quick.limit, slow.limit) == (60.0, 30.0)


def test_without_a_limit_there_is_no_thread(tmp_path: Path) -> None:
    with Watchdog(0.0, folder=tmp_path, world=ALONE):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_there_is_a_folder_for_what_nccl_writes(tmp_path: Path) -> None:
    gpu = World(rank=0, size=1, device=torch.device("cuda"))
    for world in (ALONE, gpu):
        with Watchdog(600.0, folder=tmp_path / "stacks", world=world):
            assert (tmp_path / "stacks").is_dir() == (world is gpu)


def test_nccl_writes_its_own_record_to_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    dist.record_collectives(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-"
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    known = library.read_bytes()
    assert all(re.search(name.encode(), known) for name in names if "DUMP_ON" not in name)
