"""Processes: who am I, how many are we, and shall we stop. Starts all process groups."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

ASKED_SECONDS = 15.0
"""How long a process that was asked to stop still waits for others that have not started."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`.

    group: through which they talk, None for the one that `start` joined. Two threads may not talk
    through one group: see `aside`.
    """

    rank: int
    size: int
    device: torch.device
    group: torch_dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes shared files and talks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor over all processes, in place; collective."""
        if self.size > 1:
            torch_dist.all_reduce(value, group=self.group)
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """Stack equally shaped tensors of all processes along a new first axis; collective."""
        if self.size == 1:
            return rows[None]
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        torch_dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.stack(parts)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is up in any process; collective, and no GPU is waited for."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def gather_texts(self, text: str) -> Sequence[str]:
        """Collect one string of every process, in rank order; collective."""
        data = text.encode()
        length = self.gather(torch.tensor([len(data)])).flatten()
        padded = torch.frombuffer(bytearray(data.ljust(int(length.max()) or 1)), dtype=torch.uint8)
        rows = self.gather(padded)
        return [
            row[:n].numpy().tobytes().decode() for row, n in zip(rows, length.tolist(), strict=True)
        ]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def aside(self, *, patience_seconds: float = 3600.0) -> World:
        """Form a second group of the same processes, on the CPU, for one other thread; collective.

        Its collectives wait for the slowest process for up to `patience_seconds`.
        """
        group = None
        if self.size > 1:
            timeout = timedelta(seconds=patience_seconds)
            group = torch_dist.new_group(backend="gloo", timeout=timeout)
        return World(rank=self.rank, size=self.size, device=torch.device("cpu"), group=group)

    def peak_memory(self) -> int:
        """Return the most bytes this process has held: on its GPU, or resident on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Stop:
    """Whether this process was asked to stop. A second Ctrl-C ends it at once."""

    asked = False

    @classmethod
    def ask(cls, number: int, frame: FrameType | None) -> None:
        if cls.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        cls.asked = True


def watch_signals() -> None:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into a request that `stopping` reports."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _Stop.ask)


def ignore_signals() -> None:
    """Let no further request end a process that is about to end by itself, with its own code.

    At its end the interpreter gives signals back their default, which is death.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def stopping(world: World) -> bool:
    """Tell whether any process was asked to stop; all processes get the same answer; collective."""
    return world.any(_Stop.asked)


def meet(
    store: torch_dist.Store, *, rank: int, size: int, patience_seconds: float
) -> torch_dist.Store:
    """Return a part of a store that only these processes use. Collective.

    torchrun starts processes again with the store that it has, and what is in there of the dead
    would be taken for the living. So each rank says hello by a word of its own, and rank 0 answers
    every hello that it finds, old ones too, with its word, until each rank has used that.

    Raises:
        TimeoutError: a rank did not come; where this process is asked to stop meanwhile, others may
            have died of that before they listened, and it waits for ASKED_SECONDS at most.
    """
    own = secrets.token_hex(8)
    if rank > 0:
        store.set(f"hello/{rank}", own)
        for missing in _patiently({0}, patience_seconds):
            if store.check([f"welcome/{own}"]):
                missing.clear()
        common = store.get(f"welcome/{own}").decode()
        store.set(f"here/{common}/{rank}", "")
        return torch_dist.PrefixStore(common, store)
    for missing in _patiently(set(range(1, size)), patience_seconds):
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"here/{own}/{other}"]):
                missing.remove(other)
    return torch_dist.PrefixStore(own, store)


def _patiently(missing: set[int], seconds: float) -> Iterator[set[int]]:
    """Yield the ranks that are missing until there are none; TimeoutError if some never come."""
    deadline, told = time.monotonic() + seconds, f"in {seconds:g} s"
    while missing:
        yield missing
        if _Stop.asked and deadline > time.monotonic() + ASKED_SECONDS:
            deadline, told = time.monotonic() + ASKED_SECONDS, "before this one was asked to stop"
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come {told}")
        time.sleep(0.01)


def collectives(world: World) -> bytes:
    """Return what torch's flight recorder has of the last collectives, as its tools read it."""
    library: Any = torch._C._distributed_c10d
    dump = library._dump_nccl_trace if world.device.type == "cuda" else library._dump_fr_trace
    return bytes(dump())


def record_collectives(folder: Path) -> None:
    """Have the last collectives recorded, and by nccl written to `folder` if one takes too long.

    What the environment already says of it stays.
    """
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.absolute() / "nccl-"),  # and the rank
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def start(records: Path | None = None, *, patience_seconds: float = 600.0) -> Iterator[World]:
    """Join the process group that torchrun describes, or a group of one, and leave it at the end.

    Uses nccl with one GPU a process where there are GPUs, else gloo on the CPU. A collective that
    takes longer than `patience_seconds` fails. records: where a record of the last ones goes then
    (see `record_collectives`).
    """
    watch_signals()
    if records is not None:
        record_collectives(records)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    timeout = timedelta(seconds=patience_seconds)
    store: torch_dist.Store = torch_dist.HashStore()
    if "RANK" in os.environ:
        store, *_ = next(torch_dist.rendezvous("env://", rank, size, timeout=timeout))
        store = meet(store, rank=rank, size=size, patience_seconds=patience_seconds)
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        torch_dist.destroy_process_group()
