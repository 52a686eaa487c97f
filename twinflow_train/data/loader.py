"""Batches from shards: read ahead by threads, collated, agreed on by all ranks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial
from itertools import count
from math import inf
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

from twinflow_train.batch import Batch, Condition
from twinflow_train.data.batching import Draft, Memory
from twinflow_train.data.cache import Cache
from twinflow_train.data.manifest import LatentShape
from twinflow_train.data.mixing import refuse_unlike
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import DataError, ShardSet, open_files
from twinflow_train.data.stream import Ref, Stream
from twinflow_train.errors import check

T = TypeVar("T")

LARGEST_WINDOW = 256
"""Every shard of two windows of each size stays open, as far as `open_files` allows."""
IN_FLIGHT = 32
"""Ranges that are fetched at once from behind a URL: 50 ms each, they are 640 a second."""
AT_ONCE = 8
"""Samples on a disk that a thread copies before it hands them over."""
OnError = Enum("OnError", ["raise", "skip"])
"""raise: a sample that cannot be used ends the run; skip: another one is shown in its place."""


@dataclass(kw_only=True)
class Part:
    """One more set of a mixture: its folder or URL, and how often it is shown (see `weight`)."""

    path: str = "???"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check("data.mix", self, [("weight", 0 < self.weight < inf, "positive")])


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
    threads: that read and copy; of sets behind a URL at least 32 ranges are fetched at once.
    on_error: `raise`, or `skip` a sample that cannot be used, up to `skip_budget` of them over all
        ranks in one start of the program.
    attempts: at each range behind a URL, with pauses of 0.2 s, 0.4 s, ... between, for two minutes.
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
            ("weight", 0 < self.weight < inf, "positive"),
            ("window", 1 <= self.window <= LARGEST_WINDOW, f"in 1..{LARGEST_WINDOW}"),
            ("lanes", self.lanes > 0 and self.lanes.bit_count() == 1, "a power of two"),
            ("prefetch", self.prefetch >= 0, "0 or more"),
            ("threads", self.threads >= 1, "1 or more"),
            ("skip_budget", self.skip_budget >= 0, "0 or more"),
            ("attempts", self.attempts >= 1, "1 or more"),
            ("cache_gb", 0 < self.cache_gb < inf, "positive"),
        ]
        check("data", self, rules)

    def train(self) -> tuple[ShardSet, ...]:
        """Open the training sets, once; UserError if they do not go together."""
        return self._train

    @cached_property
    def _train(self) -> tuple[ShardSet, ...]:
        named = [("data.path", self.path), *(("data.mix", part.path) for part in self.mix)]
        found = tuple(
            ShardSet(
                path,
                option=option,
                keep_open=2 * self.window,
                most_open=max(open_files() // len(named), 1),
                cache=self._cache,
                attempts=self.attempts,
            )
            for option, path in named
        )
        refuse_unlike(found)
        return found

    @cached_property
    def _cache(self) -> Cache | None:
        if self.cache is None:
            return None
        return Cache(folder=Path(self.cache), limit=int(self.cache_gb * 1e9))

    def held_out(self) -> ShardSet:
        """Open the held-out set, once."""
        return self._held_out

    @cached_property
    def _held_out(self) -> ShardSet:
        return ShardSet(
            self.heldout, option="data.heldout", cache=self._cache, attempts=self.attempts
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides which sample is shown when."""
        weights = [self.weight, *(part.weight for part in self.mix)]
        return {
            "window": self.window,
            "lanes": self.lanes,
            "by_length": self.by_length,
            "weights": weights,
            "contents": [one.manifest_sha256 for one in self.train()],
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
        assert sum(groups) == stream.batch, "groups are not the batch"
        assert all(0 <= row < stream.batch for micro in rows for row in micro), "row outside"
        flat, null = [row for micro in rows for row in micro], stream.sets[0].null
        skip = self.on_error is OnError["skip"]
        memory, ahead = Memory(), deque[list[_Micro]]()
        with self._threads(stream) as threads:
            coming = stream.plan(step, flat, groups=groups)
            if threads:
                stream.read_indexes(coming, threads.indexers)
            for then in count(step):
                plan, coming = coming, stream.plan(then + 1, flat, groups=groups)
                refs = iter(stream.rows(plan))
                parts = [[next(refs) for _ in micro] for micro in rows]
                shape = plan.latent_shape
                ahead.append([_Micro(stream, part, shape, memory, skip=skip) for part in parts])
                if threads:
                    stream.read_indexes(coming, threads.indexers)
                    for micro in ahead[-1]:
                        micro.start(threads)
                if len(ahead) > self.prefetch:
                    yield [micro.batch(null) for micro in ahead.popleft()]

    @contextmanager
    def _threads(self, stream: Stream) -> Iterator[_Threads | None]:
        """Start the threads that read, if there are to be any."""
        if not self.prefetch:
            yield None
            return
        local = all(one.place.local for one in stream.sets)
        readers = self.threads if local else max(self.threads, IN_FLIGHT)
        threads = _Threads(
            readers=ThreadPoolExecutor(readers, "read"),
            indexers=ThreadPoolExecutor(1 if local else IN_FLIGHT, "index"),
            at_once=AT_ONCE if local else 1,
        )
        try:
            yield threads
        finally:
            for pool in (threads.readers, threads.indexers):
                pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class _Threads:
    """Those that read samples, `at_once` one after the other, and those that read indexes."""

    readers: Executor
    indexers: Executor
    at_once: int


class _Micro:
    """A micro-batch in the making.

    skip: show another sample in place of one that cannot be used.
    """

    def __init__(
        self,
        stream: Stream,
        refs: Sequence[Ref],
        latent_shape: LatentShape,
        memory: Memory,
        *,
        skip: bool,
    ) -> None:
        self._stream, self._refs, self._skip = stream, refs, skip
        form = stream.sets[0].manifest.form
        lengths = {"text": [stream.tokens(ref) for ref in refs]}
        if form.own_null:
            lengths["null"] = [stream.null_tokens(ref) for ref in refs]
        self._draft = Draft(lengths, form=form, latent_shape=latent_shape, memory=memory)
        self._started: list[Future[list[str | Sample]]] = []

    def start(self, threads: _Threads) -> None:
        """Let threads copy the samples."""
        for first in range(0, len(self._refs), threads.at_once):
            last = min(first + threads.at_once, len(self._refs))
            self._started.append(threads.readers.submit(self._fill, first, last))

    def _fill(self, first: int, last: int) -> list[str | Sample]:
        """Copy the samples of some rows; return their keys, or others that are to be shown.

        Raises:
            DataError: one cannot be used.
        """
        found: list[str | DataError] = []
        for row in range(first, last):
            try:
                found.append(self._stream.copy(self._refs[row], partial(self._draft.room, row)))
            except DataError as error:
                found.append(error)
        for row, tensor in self._draft.not_finite(first, last).items():
            if isinstance(found[row - first], str):
                found[row - first] = self._stream.not_finite(self._refs[row], tensor)
        return [self._shown(row, one) for row, one in enumerate(found, first)]

    def _shown(self, row: int, found: str | DataError) -> str | Sample:
        """Return a row's key or, where it cannot be used, another sample."""
        if isinstance(found, str):
            return found
        if not self._skip:
            raise found
        return self._stream.instead(self._refs[row])

    def batch(self, null: Condition) -> Batch:
        """Return the batch when it is whole.

        Raises:
            DataError: a sample cannot be used.
        """
        parts = [started.result() for started in self._started]
        found = [one for part in parts for one in part] or self._fill(0, len(self._refs))
        others = {row: one for row, one in enumerate(found) if isinstance(one, Sample)}
        for row, sample in others.items():
            self._draft.replace(row, sample)
        keys = [one.key if isinstance(one, Sample) else one for one in found]
        return self._draft.batch(null, keys, skipped=len(others))


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
