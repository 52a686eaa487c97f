"""The order in which a stream shows its samples: a pure function of (seed, epoch, index)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from twinflow_train.rng import generator


def locate(position: int, *, seed: int, counts: tuple[int, ...], window: int) -> tuple[int, int]:
    """Return (epoch, sample index) of the stream's sample number `position`.

    position: counts over all epochs.
    counts: samples of each shard; sample indices run through the shards in this order.
    window: shards whose samples are mixed. In each epoch the shards are shuffled, cut into windows
        of `window` shards, and the samples of each window are shuffled; so each epoch shows each
        sample once, and neighbours in the stream come from few shards.
    """
    starts = _running(counts)
    epoch, offset = divmod(position, starts[-1])
    shards = _shards(seed, epoch, len(counts))
    ends = _window_ends(seed, epoch, counts, window)
    number = bisect_right(ends, offset)
    first = ends[number - 1] if number else 0
    mixed = int(_mixed(seed, epoch, number, ends[number] - first)[offset - first])
    for shard in shards[number * window : (number + 1) * window]:
        if mixed < counts[shard]:
            return epoch, starts[shard] + mixed
        mixed -= counts[shard]
    raise AssertionError("a window's samples are those of its shards")


@lru_cache(maxsize=8)
def _running(counts: Sequence[int]) -> tuple[int, ...]:
    """Return where each shard's samples start, and the total at the end."""
    return tuple(accumulate(counts, initial=0))


@lru_cache(maxsize=8)
def _shards(seed: int, epoch: int, shards: int) -> list[int]:
    """Shuffle the shards of an epoch."""
    order: list[int] = torch.randperm(shards, generator=generator("shards", seed, epoch)).tolist()
    return order


@lru_cache(maxsize=8)
def _window_ends(seed: int, epoch: int, counts: tuple[int, ...], window: int) -> tuple[int, ...]:
    """Return the position in the epoch at which each window of shuffled shards ends."""
    ends = list(accumulate(counts[shard] for shard in _shards(seed, epoch, len(counts))))
    return (*ends[window - 1 : -1 : window], ends[-1])


@lru_cache(maxsize=8)
def _mixed(seed: int, epoch: int, number: int, samples: int) -> Tensor:
    """Shuffle the samples of one window."""
    return torch.randperm(samples, generator=generator("samples", seed, epoch, number))
