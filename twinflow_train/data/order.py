"""The order in which a stream shows its samples: a pure function of (seed, epoch, position).

In each epoch the shards are shuffled and cut into windows, and the samples of each window are
mixed, so neighbours in the stream come from few shards. With several lanes, stream position p
belongs to lane p mod lanes, and each lane shows a range of the window's samples. Positions that are
equal modulo the number of ranks are one rank's: with as many lanes as ranks each reads a range of
its own; of twice as many ranks two share one, of half as many each has two that lie side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from twinflow_train.rng import generator


@dataclass(frozen=True, kw_only=True)
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
        epoch, offset = divmod(position, sum(self.counts))
        ends = _window_ends(self, epoch)
        number = bisect_right(ends, offset)
        first = ends[number - 1] if number else 0
        begin, size = position - (offset - first), ends[number] - first
        mixed = int(_mixed(self, epoch, number, begin, size)[self._slot(position, begin, size)])
        for shard in _shards(self, epoch)[number * self.window : (number + 1) * self.window]:
            if mixed < self.counts[shard]:
                return epoch, shard, mixed
            mixed -= self.counts[shard]
        raise AssertionError("a window's samples are those of its shards")

    def _slot(self, position: int, begin: int, size: int) -> int:
        """Return the place of a stream position in its window, of `size` samples from `begin`."""
        if self.lanes == 1:
            return position - begin
        lane = position % self.lanes
        starts = _lane_starts(self.lanes, begin % self.lanes, size)
        return starts[lane] + (position - begin) // self.lanes


@lru_cache(maxsize=64)
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


@lru_cache(maxsize=64)
def _shards(order: Order, epoch: int) -> list[int]:
    """Shuffle the shards of an epoch."""
    numbers = generator("shards", order.seed, epoch, *order.path)
    found: list[int] = torch.randperm(len(order.counts), generator=numbers).tolist()
    return found


@lru_cache(maxsize=64)
def _window_ends(order: Order, epoch: int) -> tuple[int, ...]:
    """Return the position in the epoch at which each window of shuffled shards ends."""
    ends: Sequence[int] = list(accumulate(order.counts[shard] for shard in _shards(order, epoch)))
    return (*ends[order.window - 1 : -1 : order.window], ends[-1])


@lru_cache(maxsize=64)
def _mixed(order: Order, epoch: int, number: int, begin: int, size: int) -> Tensor:
    """Shuffle the samples of one window, each lane's range by itself."""
    numbers = generator("samples", order.seed, epoch, number, *order.path)
    mixed = torch.randperm(size, generator=numbers)
    if order.lanes == 1:
        return mixed
    starts = sorted(_lane_starts(order.lanes, begin % order.lanes, size).values())
    lane = torch.bucketize(mixed, torch.tensor(starts[1:]), right=True)
    return mixed[lane.argsort(stable=True)]
