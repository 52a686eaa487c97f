"""Helpers that tests share: functions run by several real processes."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.forking import Forked, Server
from tests.spawned import ERROR, RESULT, TASK

GRACE_SECONDS = 10
"""How long processes that were killed may take to be gone."""


class RankError(Exception):
    """A process of `spawn` failed or hung; the message has its rank and its traceback."""


def spawn(
    function: Callable[..., Any], ranks: int, *args: object, timeout_seconds: float = 120
) -> list[Any]:
    """Run function(world, *args) in `ranks` real processes over gloo; return results in rank order.

    function must stand at the top of a module, so that the processes can import it. Each process
    has one thread, no GPU and this process's environment. Results may hold tensors. The first rank
    that fails, and any that does not end in time, is a RankError; the others are killed. Nothing
    here waits longer than the deadline and GRACE_SECONDS, whatever the processes do.
    """
    deadline = time.monotonic() + timeout_seconds
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
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        top, server = Path(name), _server()
        task = pickle.dumps((function, args))
        (top / TASK).write_bytes(pickle.dumps((shared, os.getcwd(), task)))
        processes = [Forked(folder=top / str(rank)) for rank in range(ranks)]
        try:
            for process in processes:
                server.fork(process.folder)
            _wait(processes, server, deadline, timeout_seconds)
        finally:
            _end(processes, server)
        return [torch.load(p.folder / RESULT, weights_only=False) for p in processes]


@cache
def _server() -> Server:
    """Start the server that forks ranks: it imports torch once."""
    return Server("tests.spawned", env=dict(os.environ) | {"OMP_NUM_THREADS": "1"})


def _wait(
    processes: Sequence[Forked], server: Server, deadline: float, timeout_seconds: float
) -> None:
    """Return when all have ended well; raise when one failed or time is up."""
    while True:
        ended = [process.code for process in processes]
        if ended == [0] * len(processes):
            return
        # Who failed has written its error before it ended.
        failed = [process for process in processes if (process.folder / ERROR).exists()]
        if failed:
            first = min(failed, key=lambda p: (p.folder / ERROR).stat().st_mtime_ns)
            said = (first.folder / ERROR).read_text()
            raise RankError(f"rank {first.folder.name} failed:\n{said}")
        for rank, code in enumerate(ended):
            if code:
                raise RankError(f"rank {rank} ended with exit code {code}")
        if not server.alive:
            raise RankError("the server that forks ranks has ended")
        if time.monotonic() > deadline:
            stuck = [rank for rank, code in enumerate(ended) if code is None]
            raise RankError(f"ranks {stuck} did not end in {timeout_seconds:g} seconds")
        time.sleep(0.01)


def _end(processes: Sequence[Forked], server: Server) -> None:
    """Kill what still runs; if that does not help, the server too, with all that it forked."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.alive for process in processes):
        if time.monotonic() > deadline or not server.alive:
            server.stop()
            _server.cache_clear()
            return
        for process in processes:
            if process.began:
                process.send(signal.SIGKILL)
        time.sleep(0.005)
