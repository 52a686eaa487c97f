"""Several streams in turn: which one is next, as a pure function of the turn."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from twinflow_train.rng import digest


def turns(
    first: int, count: int, *, rates: Sequence[float], path: tuple[object, ...]
) -> list[tuple[int, int]]:
    """Return (stream, its own turn) of the turns first, first + 1, ..., first + count - 1.

    Stream s has its turn number k at a random time in [k, k + 1) / rates[s]: at any time it has had
    its share of turns to within one, and the streams alternate at random. `path` sets schedules
    apart. Needs no state: any turn is found in time that grows with the streams alone.
    """
    if len(rates) == 1:
        return [(0, turn) for turn in range(first, first + count)]
    found, own = [], had(first, rates=rates, path=path)
    queue = [(_when(stream, turn, rates, path), stream) for stream, turn in enumerate(own)]
    heapq.heapify(queue)
    for _ in range(count):
        stream = queue[0][1]
        found.append((stream, own[stream]))
        own[stream] += 1
        heapq.heapreplace(queue, (_when(stream, own[stream], rates, path), stream))
    return found


def had(first: int, *, rates: Sequence[float], path: tuple[object, ...]) -> list[int]:
    """Return how many of the turns before number `first` each stream had."""
    if len(rates) == 1:
        return [first]
    # Each stream has had at most one turn more than its share: before this time not too many have.
    start = max(0.0, (first - len(rates) - 1) / sum(rates))
    own = [_before(start, stream, rates, path) for stream in range(len(rates))]
    queue = [(_when(stream, turn, rates, path), stream) for stream, turn in enumerate(own)]
    heapq.heapify(queue)
    for _ in range(first - sum(own)):
        stream = queue[0][1]
        own[stream] += 1
        heapq.heapreplace(queue, (_when(stream, own[stream], rates, path), stream))
    return own


def _when(stream: int, turn: int, rates: Sequence[float], path: tuple[object, ...]) -> float:
    """Return the time of a stream's own turn."""
    return (turn + digest("turn", *path, stream, turn) / 2**64) / rates[stream]


def _before(start: float, stream: int, rates: Sequence[float], path: tuple[object, ...]) -> int:
    """Count the turns that a stream has before a time."""
    turn = int(start * rates[stream])
    while turn > 0 and _when(stream, turn - 1, rates, path) >= start:
        turn -= 1
    while _when(stream, turn, rates, path) < start:
        turn += 1
    return turn
