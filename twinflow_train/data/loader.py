"""Batches from shards: read ahead by threads, collated, agreed on by all ranks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import torch

from twinflow_train.batch import Batch, Condition
from twinflow_train.data.manifest import NAME, LatentShape
from twinflow_train.data.ranges import Cache
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import DataError, ShardSet
from twinflow_train.data.stream import Ref, Stream
from twinflow_train.errors import UserError, check

T = TypeVar("T")

LARGEST_WINDOW = 256
"""Every shard of two windows stays open, and systems commonly allow 1,024 open files."""
OnError = Enum("OnError", ["raise", "skip"])
"""raise: a sample that cannot be used ends the run; skip: another one is shown in its place."""


@dataclass(kw_only=True)
class Part:
    """One more set of a mixture: its folder or URL, and how often it is shown (see `weight`)."""

    path: str = "???"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check("data.mix", self, [("weight", self.weight > 0, "positive")])


@dataclass(kw_only=True)
class Shards:
    """Samples from sets of shards, in folders or behind URLs (http, s3://, gs://, ...).

    path: the training set; weight: how often it is shown relative to those of `mix`.
    mix: further sets: in a time in which `path` is shown `weight` times, each of them is shown its
        own weight times.
    heldout: the held-out set.
    window: shards whose samples are mixed with one another.
    lanes: a power of two; ranks that divide it read disjoint ranges of each window's shards.
    by_length: let samples with texts of similar lengths share a micro-batch.
    prefetch: steps prepared ahead; 0: none, and no thread.
    threads: that read and copy.
    on_error: `raise`, or `skip` a sample that cannot be used, up to `skip_budget` of them over all
        ranks in one start of the program.
    attempts: at each range behind a URL, with pauses of 0.2 s, 0.4 s, ... between.
    cache: a folder for what was fetched, null for none; cache_gb: bytes / 10^9 to keep in it.
    """

    path: str = "???"
    weight: float = 1.0
    mix: list[Part] = field(default_factory=list)
    heldout: str = "???"
    window: int = 16
    lanes: int = 8
    by_length: bool = True
    prefetch: int = 2
    threads: int = 4
    on_error: OnError = OnError["raise"]
    skip_budget: int = 100
    attempts: int = 5
    cache: str | None = None
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        rules = [
            ("weight", self.weight > 0, "positive"),
            ("window", 1 <= self.window <= LARGEST_WINDOW, f"in 1..{LARGEST_WINDOW}"),
            ("lanes", self.lanes > 0 and self.lanes.bit_count() == 1, "a power of two"),
            ("prefetch", self.prefetch >= 0, "0 or more"),
            ("threads", self.threads >= 1, "1 or more"),
            ("skip_budget", self.skip_budget >= 0, "0 or more"),
            ("attempts", self.attempts >= 1, "1 or more"),
            ("cache_gb", self.cache_gb > 0, "positive"),
        ]
        check("data", self, rules)

    def train(self) -> tuple[ShardSet, ...]:
        """Open the training sets; UserError if they do not go together."""
        named = [("data.path", self.path), *(("data.mix", part.path) for part in self.mix)]
        found = tuple(
            ShardSet(
                path,
                option=option,
                keep_open=2 * self.window,
                cache=self._cache(),
                attempts=self.attempts,
            )
            for option, path in named
        )
        first = found[0].manifest
        for one in found[1:]:
            there = one.manifest
            if (there.form, there.null_sha256) != (first.form, first.null_sha256):
                raise UserError(
                    f"data.mix: {one.place} is not made as {found[0].place}: {there.form} and "
                    f"{first.form}, or another null prompt; prepare both with the same encoders"
                )
        return found

    def _cache(self) -> Cache | None:
        if self.cache is None:
            return None
        return Cache(folder=Path(self.cache), limit=int(self.cache_gb * 1e9))

    def held_out(self) -> ShardSet:
        """Open the held-out set."""
        return ShardSet(self.heldout, option="data.heldout", attempts=self.attempts)

    def identity(self) -> dict[str, Any]:
        """Return what decides which sample is shown when."""
        weights = [self.weight, *(part.weight for part in self.mix)]
        return {
            "window": self.window,
            "lanes": self.lanes,
            "by_length": self.by_length,
            "weights": weights,
            "contents": [(one.place / NAME).sha256() for one in self.train()],
        }

    def stream(self, *, seed: int, batch: int) -> Stream:
        """Return the stream of global batches."""
        return Stream(
            sets=self.train(),
            weights=(self.weight, *(part.weight for part in self.mix)),
            seed=seed,
            batch=batch,
            window=self.window,
            lanes=self.lanes,
            by_length=self.by_length,
        )

    def epochs(self, stream: Stream, step: int) -> dict[str, float]:
        """Return how often each set was shown before a step, as metrics."""
        names = [one.place.name for one in stream.sets]
        if len(names) == 1:
            return {"data/epoch": stream.epochs(step)[0]}
        shown = zip(names, stream.epochs(step), strict=True)
        return {f"data/epoch/{n}-{name}": each for n, (name, each) in enumerate(shown)}

    def batches(
        self,
        stream: Stream,
        *,
        rows: Sequence[Sequence[int]],
        groups: Sequence[int],
        step: int,
    ) -> Generator[list[Batch]]:
        """Yield, for each step without end, one Batch for each micro-step of this rank.

        rows: for each micro-step, positions in the global batch; the ranks' rows are disjoint.
        groups: sizes of the parts of a batch inside which samples may change places.
        step: the first step; nothing before it is read.
        """
        assert all(0 <= row < stream.batch for micro in rows for row in micro), "row outside"
        flat, null = [row for micro in rows for row in micro], stream.sets[0].null
        with ExitStack() as stack:
            pool = None
            if self.prefetch:
                pool = stack.enter_context(ThreadPoolExecutor(self.threads, "read"))
            ahead: deque[tuple[LatentShape, list[_Reading]]] = deque()
            for now in count(step):
                while len(ahead) <= self.prefetch:
                    refs = stream.rows(now + len(ahead), flat, groups=groups)
                    shape = stream.shape(now + len(ahead))
                    ahead.append((shape, [_Reading(stream, ref, pool) for ref in refs]))
                shape, readings = ahead.popleft()
                found = iter([self._read(reading) for reading in readings])
                parts = [[next(found) for _ in micro] for micro in rows]
                yield [collate(part, null, latent_shape=shape, pool=pool) for part in parts]

    def _read(self, reading: _Reading) -> tuple[Sample, bool]:
        """Return a sample, or where samples may be skipped another one, and whether it is another.

        Raises:
            DataError: it cannot be used.
        """
        try:
            return reading.result(), False
        except DataError:
            if self.on_error is OnError["raise"]:
                raise
            return reading.stream.instead(reading.ref), True


class _Reading:
    """A sample that a pool, if there is one, is about to read."""

    def __init__(self, stream: Stream, ref: Ref, pool: ThreadPoolExecutor | None) -> None:
        self.stream, self.ref = stream, ref
        self._future: Future[Sample] | None = pool.submit(stream.read, ref) if pool else None

    def result(self) -> Sample:
        """Return the sample, read now unless a pool does."""
        return self._future.result() if self._future else self.stream.read(self.ref)


def collate(
    samples: Sequence[tuple[Sample, bool]],
    null: Condition,
    *,
    latent_shape: LatentShape,
    pool: ThreadPoolExecutor | None = None,
) -> Batch:
    """Copy samples, each with whether it stands in for another, into one batch in their own types.

    Texts are padded to the longest. Without latents (image-free training) the data are zeros. In
    page-locked memory where there is a GPU.
    """
    many, (first, _) = len(samples), samples[0]
    pinned = torch.cuda.is_available()
    longest, width = max(len(sample.text) for sample, _ in samples), first.text.shape[1]
    kind = torch.float32 if first.latent is None else first.latent.dtype
    fresh = torch.zeros if first.latent is None else torch.empty
    data = fresh(many, *latent_shape, dtype=kind, pin_memory=pinned)
    tokens = torch.empty(many, longest, width, dtype=first.text.dtype, pin_memory=pinned)
    mask = torch.zeros(many, longest, dtype=torch.bool, pin_memory=pinned)

    def put(row: int) -> None:
        sample, _ = samples[row]
        length = len(sample.text)
        if sample.latent is not None:
            data[row].copy_(sample.latent)
        tokens[row, :length].copy_(sample.text)
        tokens[row, length:].zero_()
        mask[row, :length] = True

    for _ in (pool.map if pool else map)(put, range(many)):
        pass
    return Batch(
        data=data,
        cond=Condition(
            tokens=tokens,
            mask=None if bool(mask.all()) else mask,
            pooled=torch.stack([s.pooled[0] for s, _ in samples]) if first.pooled else None,
            references=tuple(
                torch.stack([s.references[n] for s, _ in samples])
                for n in range(len(first.references))
            ),
        ),
        null=null,
        keys=tuple(sample.key for sample, _ in samples),
        skipped=sum(other for _, other in samples),
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
