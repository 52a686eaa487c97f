"""Which rank is slow, where all wait for one another in every layer and so take equally long."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Sequence
from statistics import mean, median

import torch
from torch import Tensor

from twinflow_train.dist import World

RECENT = 32
"""Steps whose times are looked at together; fewer say nothing yet."""
log = logging.getLogger(__name__)


class Pace:
    """Tells each rank's own time from the times of steps, which are the same on all ranks.

    A rank's own time is how long it waited for its data, and its part of the rest. To know that,
    each rank repeats a small piece of work by itself every step (1 ms): the slowest needs all of
    the step, the others as much less as they need less for that piece. Collective.

    What ranks tell goes with a sum that is made anyway, and no GPU is waited for.
    """

    def __init__(self, world: World, *, slow_above: float) -> None:
        self._world, self._slow_above = world, slow_above
        self._hosts = world.gather_texts(socket.gethostname())
        self._probe = _GPUProbe(world.device) if world.device.type == "cuda" else _CPUProbe()
        self._waits: deque[float] = deque(maxlen=RECENT)
        self._works: deque[float] = deque(maxlen=RECENT)
        self._named = -1

    def mine(self, waited: float) -> Tensor:
        """Return what this rank tells, 2 x ranks numbers; the others' places are zeros.

        waited: seconds for its own data.
        """
        if (work := self._probe.take()) is not None:
            self._works.append(work)
        self._waits.append(waited)
        slots = torch.zeros(2, self._world.size)
        told = [mean(self._waits), median(self._works or [0.0])]
        slots[:, self._world.rank] = torch.tensor(told)
        return slots.flatten().to(self._world.device, non_blocking=True)

    def figures(self, told: Sequence[float], *, seconds: float) -> dict[str, float]:
        """Give what a log takes, and name a rank that is slow.

        told: the sum of what all ranks told. seconds: the present step without waiting for data.
        """
        size = self._world.size
        waits, works = told[:size], told[size:]
        most = max(works) or 1.0
        own = [wait + seconds * work / most for wait, work in zip(waits, works, strict=True)]
        slowest = max(range(size), key=own.__getitem__)
        usual = median(own)
        spread = own[slowest] / usual if usual else 1.0
        if len(self._works) == RECENT and self._slow_above and self._world.main:
            self._name(slowest, spread, own[slowest], usual)
        return {"time/slowest": own[slowest], "time/spread": spread}

    def _name(self, rank: int, spread: float, own: float, usual: float) -> None:
        """Warn of a slow rank, once until it is fast again or another one is slower."""
        if spread <= self._slow_above:
            self._named = -1
        elif rank != self._named:
            self._named = rank
            log.warning(
                "rank %d on %s is slow: %.3g seconds a step of its own, where the median is %.3g",
                *(rank, self._hosts[rank], own, usual),
            )


class _CPUProbe:
    """A piece of work for a CPU."""

    def __init__(self) -> None:
        self._matrix = torch.ones(128, 128)

    def take(self) -> float | None:
        """Do it, and return the seconds that it took."""
        began = time.perf_counter()
        for _ in range(8):
            self._matrix @ self._matrix
        return time.perf_counter() - began


class _GPUProbe:
    """A piece of work for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._matrix)
        self._began = torch.cuda.Event(enable_timing=True)
        self._ended = torch.cuda.Event(enable_timing=True)
        self._launched = False

    def take(self) -> float | None:
        """Launch it, and return the seconds that the one before took, if it is done."""
        if self._launched and not self._ended.query():
            return None
        seconds = self._began.elapsed_time(self._ended) / 1000 if self._launched else None
        self._began.record()
        for _ in range(32):
            torch.mm(self._matrix, self._matrix, out=self._out)
        self._ended.record()
        self._launched = True
        return seconds
