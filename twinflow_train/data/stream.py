"""Which samples make each global batch: a pure function of (seed, step) for any number of ranks."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

from twinflow_train.data import ranges
from twinflow_train.data.manifest import LatentShape
from twinflow_train.data.order import Order
from twinflow_train.data.sample import Room, Sample
from twinflow_train.data.schedule import had, turns
from twinflow_train.data.shards import DataError, ShardSet, Unreached
from twinflow_train.rng import digest

TRIES = 8
"""Samples that are tried in place of one that cannot be used."""


class Ref(NamedTuple):
    """A sample to be shown.

    set, shard, place: numbers of its set, its shard there, and its place in that. number: of the
    sample in its set. caption: the hash that picks its caption. epoch: of its set and shape.
    """

    set: int
    shard: int
    place: int
    number: int
    caption: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples make some rows of a step's batch.

    refs: the samples, as they come. together: rows among which they may change places.
    """

    latent_shape: LatentShape
    wanted: Sequence[int]
    refs: Mapping[int, Ref]
    together: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """An endless stream of global batches, each of one latent shape, from sets of shards.

    weights: how often each set is shown whole, relative to the others. batch: samples of a global
    batch. window, lanes: see `Order`. by_length: samples with texts of similar lengths become
    neighbours in their batch (see `rows`).

    Shapes take turns in proportion to their samples. What a shape has left at the end of an epoch
    that is no whole batch begins its next batch: each epoch shows each sample once.
    """

    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...]
    seed: int
    batch: int
    window: int
    lanes: int
    by_length: bool

    @cached_property
    def shapes(self) -> tuple[LatentShape, ...]:
        """All latent shapes, in their order of appearance."""
        return tuple(dict.fromkeys(shape for s in self.sets for shape in s.manifest.buckets))

    @cached_property
    def _sources(self) -> tuple[tuple[tuple[int, float, Order], ...], ...]:
        """For each shape: number, rate and order of each set that has it."""
        return tuple(
            tuple(
                (number, weight * sum(counts), self._order(number, bucket, counts))
                for number, (one, weight) in enumerate(zip(self.sets, self.weights, strict=True))
                if (counts := tuple(one.counts[k] for k in one.manifest.buckets.get(shape, ())))
            )
            for bucket, shape in enumerate(self.shapes)
        )

    def _order(self, number: int, bucket: int, counts: tuple[int, ...]) -> Order:
        # One set of one shape, the usual case, needs nothing to tell its numbers from others'.
        path = (number, bucket) if number or bucket else ()
        return Order(seed=self.seed, counts=counts, window=self.window, lanes=self.lanes, path=path)

    def _bucket(self, step: int) -> tuple[int, int]:
        """Return a step's shape, by number, and how many batches of that shape came before."""
        return turns(step, 1, rates=self._rates, path=("shape", self.seed))[0]

    @cached_property
    def _rates(self) -> tuple[float, ...]:
        """The rate of each shape."""
        return tuple(sum(rate for _, rate, _ in sources) for sources in self._sources)

    def plan(self, step: int, wanted: Sequence[int], *, groups: Sequence[int]) -> Plan:
        """Find the samples of some rows of a step's batch, without reading anything.

        groups: sizes of the parts of a batch inside which `by_length` may change places, sums to
        the batch.
        """
        bucket, turn = self._bucket(step)
        sources, first = self._sources[bucket], turn * self.batch
        if len(sources) == 1:
            order = [(0, position) for position in range(first, first + self.batch)]
        else:
            rates, path = [rate for _, rate, _ in sources], ("set", self.seed, bucket)
            order = turns(first, self.batch, rates=rates, path=path)
        together = self._together(wanted, groups)
        refs = {row: self._ref(bucket, *order[row]) for rows in together for row in rows}
        return Plan(latent_shape=self.shapes[bucket], wanted=wanted, refs=refs, together=together)

    def _together(self, wanted: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
        """List rows among which samples may change places."""
        if not self.by_length:
            return [[row] for row in wanted]
        ends = list(accumulate(groups))
        parts = sorted({(bisect_right(ends, row), row % self.lanes) for row in wanted})
        spans = [(range(ends[part] - groups[part], ends[part]), lane) for part, lane in parts]
        return [[row for row in span if row % self.lanes == lane] for span, lane in spans]

    def _ref(self, bucket: int, which: int, position: int) -> Ref:
        """Return the sample that one of a shape's sources shows at a position of its own."""
        number, _, order = self._sources[bucket][which]
        epoch, nth, place = order.locate(position)
        one = self.sets[number]
        shard = one.manifest.buckets[self.shapes[bucket]][nth]
        index = one.start(shard) + place
        extra = (number,) if number else ()
        caption = digest("caption", self.seed, epoch, index, *extra)
        return Ref(number, shard, place, index, caption, epoch)

    def read_indexes(self, plan: Plan, pool: Executor) -> None:
        """Begin to read the indexes that `rows` asks for, those that are not there."""
        for number, shard in {(ref.set, ref.shard) for ref in plan.refs.values()}:
            if not self.sets[number].has_index(shard):
                pool.submit(self.sets[number].index, shard)

    def rows(self, plan: Plan) -> list[Ref]:
        """Return the samples of the wanted rows, in their places.

        With `by_length`, among rows that are equal modulo `lanes` and in one group, texts become
        longer from row to row: so no sample leaves its lane, and rows that are close are alike.

        Raises:
            Unreached: an index that tells lengths cannot be read, perhaps by this rank alone, and
                other ranks have some of its rows: they would choose other samples for theirs.
        """
        found: dict[int, Ref] = {}
        mine = set(plan.wanted)
        for rows in plan.together:
            tokens = partial(self.tokens, agreed=not mine.issuperset(rows))
            refs = (plan.refs[row] for row in rows)
            found |= zip(rows, sorted(refs, key=tokens), strict=True)
        return [found[row] for row in plan.wanted]

    def tokens(self, ref: Ref, *, agreed: bool = False) -> int:
        """Return the length of a sample's text; of one without an index 1: reading it tells why.

        Raises:
            Unreached: its index cannot be read now, and all ranks have to be `agreed` on it.
        """
        try:
            tokens = self.sets[ref.set].index(ref.shard)[ref.place].tokens
        except DataError as error:
            if agreed and isinstance(error, Unreached):
                raise
            return 1
        return tokens[ref.caption % len(tokens)]

    def null_tokens(self, ref: Ref) -> int:
        """Return the length of a sample's own null prompt; without an index 1, see `tokens`."""
        try:
            return max(self.sets[ref.set].index(ref.shard)[ref.place].null, 1)
        except DataError:
            return 1

    def copy(self, ref: Ref, room: Room) -> str:
        """Copy a sample to where there is room for it, and return its key.

        Raises:
            DataError: it cannot be used.
        """
        one = self.sets[ref.set]
        entry = one.index(ref.shard)[ref.place]
        one.copy(ref.shard, entry, room, caption=ref.caption)
        return entry.key

    def not_finite(self, ref: Ref, tensor: str) -> DataError:
        """Say that one of a sample's tensors is not finite."""
        one = self.sets[ref.set]
        error = ValueError(f"`{tensor}` is not finite")
        return one.fault(ref.shard, one.index(ref.shard)[ref.place], error)

    def instead(self, ref: Ref) -> Sample:
        """Read another sample of the same set and shape, in place of one that cannot be used.

        Raises:
            DataError: there is none among some that were tried.
        """
        one = self.sets[ref.set]
        numbers = one.manifest.buckets[one.manifest.shards[ref.shard].latent_shape]
        ends = list(accumulate(one.counts[n] for n in numbers))
        problems: list[DataError] = []
        deadline = time.monotonic() + ranges.LONGEST
        for attempt in range(TRIES):
            chosen = digest("instead", self.seed, ref.epoch, ref.number, attempt) % ends[-1]
            shard = bisect_right(ends, chosen)
            index = one.start(numbers[shard]) + chosen - ends[shard] + one.counts[numbers[shard]]
            try:
                return one.read(index, caption=ref.caption)
            except DataError as error:
                problems.append(error)
            if time.monotonic() > deadline:
                break
        raise DataError(
            f"{problems[0]} (and so on: {len(problems)} samples that were tried in its place "
            "cannot be used either)"
        )

    def epochs(self, step: int) -> list[float]:
        """Return how often each set was shown up to a step, in epochs of its own."""
        shown = [0] * len(self.sets)
        batches = had(step, rates=self._rates, path=("shape", self.seed))
        for bucket, sources in enumerate(self._sources):
            rates = [rate for _, rate, _ in sources]
            samples = had(
                batches[bucket] * self.batch, rates=rates, path=("set", self.seed, bucket)
            )
            for (number, _, _), each in zip(sources, samples, strict=True):
                shown[number] += each
        return [n / len(one) for n, one in zip(shown, self.sets, strict=True)]
