"""The order in which a stream shows its samples: a pure function of (seed, epoch, position).

In each epoch the shards are shuffled and cut into windows, and the samples of each window are
mixed, so neighbours in the stream come from few shards. With several lanes, stream position p
belongs to lane p mod lanes, and each lane shows a range of the window's samples. Positions that are
equal modulo the number of ranks are one rank's: with as many lanes as ranks each reads a range of
its own; of twice as many ranks two share one, of half as many each has two that lie side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from twinflow_train.rng import generator


class _Window(NamedTuple):
    """Shards whose samples are mixed.

    begin: its first position in the stream. ends: where each shard ends among its samples.
    starts: where each lane begins; empty for one lane. mixed: its samples in their order.
    """

    begin: int
    shards: list[int]
    ends: list[int]
    starts: dict[int, int]
    mixed: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """How an endless stream runs through shards of `counts` samples.

    window: shards whose samples are mixed. lanes: a power of two. path: sets streams with equal
    seeds apart.
    """

    seed: int
    counts: tuple[int, ...]
    window: int
    lanes: int = 1
    path: tuple[object, ...] = ()

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, shard, place in it) of the stream's sample number `position`.

        `position` counts over all epochs. Each epoch shows each sample once.
        """
        epoch, offset = divmod(position, self._total)
        _, ends = self._epochs(epoch)
        window = self._windows(epoch, bisect_right(ends, offset))
        slot = position - window.begin
        if self.lanes > 1:
            slot = window.starts[position % self.lanes] + slot // self.lanes
        mixed = int(window.mixed[slot])
        number = bisect_right(window.ends, mixed)
        shard = window.shards[number]
        return epoch, shard, mixed - window.ends[number] + self.counts[shard]

    @cached_property
    def _total(self) -> int:
        return sum(self.counts)

    @cached_property
    def _epochs(self) -> Callable[[int], tuple[list[int], list[int]]]:
        return lru_cache(maxsize=2)(self._epoch)

    @cached_property
    def _windows(self) -> Callable[[int, int], _Window]:
        return lru_cache(maxsize=4)(self._mix)

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shuffle the shards of an epoch, and tell at which sample of it each window ends."""
        numbers = generator("shards", self.seed, epoch, *self.path)
        shards: list[int] = torch.randperm(len(self.counts), generator=numbers).tolist()
        ends = list(accumulate(self.counts[shard] for shard in shards))
        return shards, [*ends[self.window - 1 : -1 : self.window], ends[-1]]

    def _mix(self, epoch: int, number: int) -> _Window:
        """Shuffle the samples of one window, each lane's range by itself."""
        all_shards, all_ends = self._epochs(epoch)
        begin = epoch * self._total + (all_ends[number - 1] if number else 0)
        shards = all_shards[number * self.window : (number + 1) * self.window]
        ends = list(accumulate(self.counts[shard] for shard in shards))
        numbers = generator("samples", self.seed, epoch, number, *self.path)
        mixed = torch.randperm(ends[-1], generator=numbers)
        starts: dict[int, int] = {}
        if self.lanes > 1:
            starts = _lane_starts(self.lanes, begin % self.lanes, ends[-1])
            borders = torch.tensor(sorted(starts.values())[1:])
            mixed = mixed[torch.bucketize(mixed, borders, right=True).argsort(stable=True)]
        return _Window(begin, shards, ends, starts, mixed.numpy())


def _lane_starts(lanes: int, begin: int, size: int) -> dict[int, int]:
    """Return where each lane's range begins in a window of `size` samples.

    Lanes stand in the order of their reversed bits: those that are equal modulo a smaller power of
    two are side by side. A lane's first position is within `lanes` of `begin`.
    """
    bits = lanes.bit_length() - 1
    starts, start = {}, 0
    for k in range(lanes):
        lane = int(f"{k:0{bits}b}"[::-1], 2)
        starts[lane] = start
        start += max(0, -(-(size - (lane - begin) % lanes) // lanes))
    return starts
