"""The stream of batches: which samples make each step, on this rank, from any point on."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from queue import Queue
from typing import TypeVar

import torch

from twinflow_train.batch import Batch, Condition
from twinflow_train.data.order import locate
from twinflow_train.data.shards import Sample, ShardSet
from twinflow_train.rng import digest

T = TypeVar("T")

LARGEST_WINDOW = 256
"""Every shard of two windows stays open, and systems commonly allow 1,024 open files."""


@dataclass(kw_only=True)
class Shards:
    """Samples from folders of shards.

    path: folder of the training shards.
    heldout: folder of the held-out shards.
    window: shards whose samples are mixed with one another.
    prefetch: steps prepared ahead by a thread; 0 for none.
    """

    path: str = "???"
    heldout: str = "???"
    window: int = 16
    prefetch: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.window <= LARGEST_WINDOW:
            raise ValueError(f"data.window is {self.window}, but must be in 1..{LARGEST_WINDOW}")
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch is {self.prefetch}, but must be at least 0")

    def train(self) -> ShardSet:
        """Open the training shards."""
        return ShardSet(self.path, option="data.path", keep_open=2 * self.window)

    def held_out(self) -> ShardSet:
        """Open the held-out shards."""
        return ShardSet(self.heldout, option="data.heldout")

    def batches(
        self, *, seed: int, batch: int, rows: Sequence[Sequence[int]], start: int
    ) -> Iterator[list[Batch]]:
        """Yield, for each step without end, one Batch for each micro-step of this rank.

        batch: samples of a global batch.
        rows: for each micro-step, positions in the global batch; the ranks' rows are disjoint.
        start: samples consumed so far by all ranks, a multiple of `batch`.
        """
        assert start % batch == 0, f"{start} samples are no whole number of batches of {batch}"
        assert all(0 <= row < batch for micro in rows for row in micro), "a row outside the batch"
        shards = self.train()
        for first in count(start, batch):
            yield [
                collate([self._sample(shards, seed, first + row) for row in micro], shards.null)
                for micro in rows
            ]

    def _sample(self, shards: ShardSet, seed: int, position: int) -> Sample:
        """Read the stream's sample number `position` with the caption drawn for it."""
        epoch, index = locate(position, seed=seed, counts=shards.counts, window=self.window)
        return shards.read(index, caption=digest("caption", seed, epoch, index))


def collate(samples: Sequence[Sample], null: Condition) -> Batch:
    """Stack samples of one latent shape as a float32 batch, padding the text."""
    return Batch(
        data=torch.stack([sample.latent.float() for sample in samples]),
        cond=Condition.pad([sample.text.float() for sample in samples]),
        null=null,
        keys=tuple(sample.key for sample in samples),
    )


@dataclass(frozen=True)
class _End:
    """The last thing in a queue: the items are at their end, by `error` or without."""

    error: BaseException | None


def prefetch(items: Iterator[T], depth: int) -> Generator[T]:
    """Yield the items of an iterator that a thread runs up to `depth` items ahead; 0 for no thread.

    An error of the iterator is raised here, after the items before it. Closing this generator
    stops the thread after the item that it is making.
    """
    if depth == 0:
        yield from items
        return
    ready: Queue[T | _End] = Queue(depth)
    closed = threading.Event()
    thread = threading.Thread(
        target=_fill, args=(ready, items, closed), name="prefetch", daemon=True
    )
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        while not ready.empty():  # the thread may wait for room to put one last item
            ready.get_nowait()
        thread.join()


def _fill(ready: Queue[T | _End], items: Iterator[T], closed: threading.Event) -> None:
    """Put items into a queue until they end or nobody wants them."""
    error: BaseException | None = None
    try:
        for item in items:
            ready.put(item)
            if closed.is_set():
                return
    except BaseException as caught:  # noqa: BLE001 - the consumer raises it
        error = caught
    ready.put(_End(error))
