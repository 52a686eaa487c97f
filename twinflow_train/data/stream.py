"""Which samples make each global batch: a pure function of (seed, step) for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from twinflow_train.data.manifest import LatentShape
from twinflow_train.data.order import Order
from twinflow_train.data.sample import Sample
from twinflow_train.data.schedule import had, turns
from twinflow_train.data.shards import DataError, ShardSet
from twinflow_train.rng import digest

TRIES = 10_000
"""Samples that are tried in place of one that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A sample to be shown: number of its set, its index there, the hash that picks its caption."""

    set: int
    index: int
    caption: int
    epoch: int


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
                (number, weight * sum(counts) / len(one), self._order(number, bucket, counts))
                for number, (one, weight) in enumerate(zip(self.sets, self.weights, strict=True))
                if (counts := tuple(one.counts[k] for k in one.manifest.buckets.get(shape, ())))
            )
            for bucket, shape in enumerate(self.shapes)
        )

    def _order(self, number: int, bucket: int, counts: tuple[int, ...]) -> Order:
        # One set of one shape, the usual case, needs nothing to tell its numbers from others'.
        path = (number, bucket) if number or bucket else ()
        return Order(seed=self.seed, counts=counts, window=self.window, lanes=self.lanes, path=path)

    def shape(self, step: int) -> LatentShape:
        """Return the latent shape of a step's batch."""
        return self.shapes[self._bucket(step)[0]]

    def _bucket(self, step: int) -> tuple[int, int]:
        """Return a step's shape, by number, and how many batches of that shape came before."""
        return turns(step, 1, rates=self._rates, path=("shape", self.seed))[0]

    @cached_property
    def _rates(self) -> tuple[float, ...]:
        """The rate of each shape."""
        return tuple(sum(rate for _, rate, _ in sources) for sources in self._sources)

    def rows(self, step: int, wanted: Sequence[int], *, groups: Sequence[int]) -> list[Ref]:
        """Return the samples at some rows of a step's batch.

        groups: sizes of the parts of a batch inside which `by_length` may change places, sums to
        the batch. Among rows that are equal modulo `lanes` and in one group, texts become longer
        from row to row: so no sample leaves its lane, and rows that are close are alike.
        """
        bucket, turn = self._bucket(step)
        members = list(self._members(bucket, turn * self.batch))
        if not self.by_length:
            return [members[row] for row in wanted]
        found: dict[int, Ref] = {}
        ends = [sum(groups[: k + 1]) for k in range(len(groups))]
        for begin, end in zip([0, *ends], ends, strict=False):
            mine = {row for row in wanted if begin <= row < end}
            for lane in {row % self.lanes for row in mine}:
                rows = [row for row in range(begin, end) if row % self.lanes == lane]
                refs = sorted((members[row] for row in rows), key=self._tokens)
                found |= dict(zip(rows, refs, strict=True))
        return [found[row] for row in wanted]

    def _members(self, bucket: int, first: int) -> Iterator[Ref]:
        """Yield the samples of a batch whose shape was shown `first` samples before, in order."""
        sources = self._sources[bucket]
        rates, path = [rate for _, rate, _ in sources], ("set", self.seed, bucket)
        for which, position in turns(first, self.batch, rates=rates, path=path):
            number, _, order = sources[which]
            epoch, shard, place = order.locate(position)
            one = self.sets[number]
            index = one.start(one.manifest.buckets[self.shapes[bucket]][shard]) + place
            extra = (number,) if number else ()
            caption = digest("caption", self.seed, epoch, index, *extra)
            yield Ref(set=number, index=index, caption=caption, epoch=epoch)

    def _tokens(self, ref: Ref) -> int:
        """Return the length of a sample's text; of one without an index 0: reading it tells why."""
        try:
            tokens = self.sets[ref.set].entry(ref.index).tokens
        except DataError:
            return 0
        return tokens[ref.caption % len(tokens)]

    def read(self, ref: Ref) -> Sample:
        """Read a sample; DataError if it cannot be used."""
        return self.sets[ref.set].read(ref.index, caption=ref.caption)

    def instead(self, ref: Ref) -> Sample:
        """Read the next sample of the same shard set and shape that can be used.

        Raises:
            DataError: there is none among many.
        """
        one = self.sets[ref.set]
        number, _ = one.split(ref.index)
        shape = one.manifest.shards[number].latent_shape
        numbers = one.manifest.buckets[shape]
        indices = [k for n in numbers for k in range(one.start(n), one.start(n) + one.counts[n])]
        at = indices.index(ref.index)
        problem: DataError | None = None
        for index in (indices[at + 1 :] + indices[:at])[:TRIES]:
            try:
                return one.read(index, caption=ref.caption)
            except DataError as error:
                problem = problem or error
        raise problem or DataError(f"{one.place}: there is no other sample of shape {shape}")

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
