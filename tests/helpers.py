"""Helpers that tests share: functions run by several real processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests import spawned


class RankError(Exception):
    """A process of `spawn` failed or hung; the message has its rank and its traceback."""


def spawn(
    function: Callable[..., Any], ranks: int, *args: object, timeout_seconds: float = 120
) -> list[Any]:
    """Run function(world, *args) in `ranks` real processes over gloo; return results in rank order.

    function must stand at the top of a module, so that the processes can import it. Each process
    has one thread, no GPU and this process's environment. Results may hold tensors. The first rank
    that fails, and any that does not end in time, is a RankError; the others are killed.
    """
    # The server imports torch once, each process is a cheap copy of it; this process is never
    # copied, because its threads would not survive that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor"])
    # The store lives here as it does in torchrun's agent, so no free port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(os.environ) | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    task = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                context.Process(target=spawned.rank, args=(Path(folder), env, task), daemon=True)
            )
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), timeout_seconds)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout_seconds: float) -> None:
    """Return when all have ended well; raise when one failed or time is up."""
    deadline = time.monotonic() + timeout_seconds
    while any(process.exitcode != 0 for process in processes):
        errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RankError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
        for rank, process in enumerate(processes):
            if process.exitcode:
                raise RankError(f"rank {rank} ended with exit code {process.exitcode}")
        if time.monotonic() > deadline:
            stuck = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise RankError(f"ranks {stuck} did not end in {timeout_seconds:g} seconds")
        processes[0].join(0.02)
        time.sleep(0.01)
