"""What is shown when: random sets, batches and ranks against what a stream promises."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tools import Shard, make_shards
from twinflow_train.data.loader import Part, Shards
from twinflow_train.data.stream import Ref, Stream
from twinflow_train.deal import Deal

SHAPES = ((1, 2, 2), (1, 1, 4), (2, 1, 2))
SHARD = st.tuples(st.sampled_from(SHAPES), st.lists(st.integers(1, 9), min_size=1, max_size=5))
SET = st.lists(SHARD, min_size=1, max_size=5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sets with their weights, and how they are shown."""

    sets: Sequence[Sequence[Shard]]
    weights: Sequence[float] = (1.0,)
    batch: int
    groups: Sequence[int]
    seed: int = 0
    window: int = 16
    lanes: int = 8
    by_length: bool = True

    def write(self, folder: Path) -> Shards:
        """Write the sets and return what shows them."""
        paths = [str(make_shards(folder / str(n), one)) for n, one in enumerate(self.sets)]
        mix = [
            Part(path=path, weight=weight)
            for path, weight in zip(paths[1:], self.weights[1:], strict=True)
        ]
        return Shards(
            path=paths[0],
            weight=self.weights[0],
            mix=mix,
            window=self.window,
            lanes=self.lanes,
            by_length=self.by_length,
            prefetch=0,
        )

    def stream(self, data: Shards) -> Stream:
        """Open a stream of them that knows nothing yet."""
        return data.stream(seed=self.seed, batch=self.batch)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw one to three sets, and batches with up to three groups."""
    sets = draw(st.lists(SET, min_size=1, max_size=3))
    batch = draw(st.sampled_from([2, 4, 6, 8, 12, 16]))
    cuts = sorted(draw(st.lists(st.integers(0, batch), max_size=2)))
    return Case(
        sets=sets,
        weights=draw(st.lists(st.floats(0.2, 5), min_size=len(sets), max_size=len(sets))),
        batch=batch,
        groups=[end - begin for begin, end in zip([0, *cuts], [*cuts, batch], strict=True)],
        seed=draw(st.integers(0, 2**40)),
        window=draw(st.integers(1, 7)),
        lanes=draw(st.sampled_from([1, 2, 4, 8])),
        by_length=draw(st.booleans()),
    )


def shown(stream: Stream, step: int, rows: Sequence[int], groups: Sequence[int]) -> list[Ref]:
    return stream.rows(stream.plan(step, rows, groups=groups))


def whole(case: Case, stream: Stream, step: int) -> list[Ref]:
    """Return all of a global batch."""
    return shown(stream, step, range(case.batch), case.groups)


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_each_epoch_of_each_set_shows_each_sample_once(case: Case) -> None:
    """A batch has one shape; what an epoch leaves over begins the next batch of that shape."""
    with tempfile.TemporaryDirectory() as folder:
        stream = case.stream(case.write(Path(folder)))
        seen: Counter[tuple[int, int, int]] = Counter()
        newest: dict[tuple[int, object], int] = {}
        for step in range(2 * sum(map(len, stream.sets)) // case.batch + 6):
            plan = stream.plan(step, range(case.batch), groups=case.groups)
            for ref in stream.rows(plan):
                shard = stream.sets[ref.set].manifest.shards[ref.shard]
                assert shard.latent_shape == plan.latent_shape
                assert ref.number == stream.sets[ref.set].start(ref.shard) + ref.place
                seen[ref.set, ref.epoch, ref.number] += 1
                newest[ref.set, plan.latent_shape] = ref.epoch
        assert set(seen.values()) == {1}
        for number, one in enumerate(stream.sets):
            for shape, shards in one.manifest.buckets.items():
                members = {one.start(n) + k for n in shards for k in range(one.counts[n])}
                for epoch in range(newest.get((number, shape), 0)):
                    assert members <= {k for s, e, k in seen if (s, e) == (number, epoch)}


@settings(deadline=None, max_examples=25)
@given(case=cases(), choices=st.data())
def test_neither_ranks_nor_where_a_run_begins_change_a_batch(
    case: Case, choices: st.DataObject
) -> None:
    """The number of ranks is another one at every step, and so is what was asked before."""
    with tempfile.TemporaryDirectory() as folder:
        data = case.write(Path(folder))
        first = case.stream(data)
        wanted = {step: whole(case, first, step) for step in range(4)}
        sizes = [n for n in range(1, case.batch + 1) if case.batch % n == 0]
        resumed = case.stream(data)
        for step in choices.draw(st.permutations(range(4))):
            ranks = choices.draw(st.sampled_from(sizes))
            micro = choices.draw(
                st.sampled_from([n for n in sizes if case.batch // ranks % n == 0])
            )
            found: dict[int, Ref] = {}
            for rank in range(ranks):
                deal = Deal(batch=case.batch, micro_batch=micro, ranks=ranks, rank=rank)
                rows = [row for rows in deal.rows() for row in rows]
                found |= zip(rows, shown(resumed, step, rows, case.groups), strict=True)
            assert [found[row] for row in range(case.batch)] == wanted[step]


@settings(deadline=None, max_examples=25)
@given(case=cases(), step=st.integers(0, 20))
def test_lengths_change_places_only_within_a_group_and_a_lane(case: Case, step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = case.write(Path(folder))
        plain, sorted_ = (
            case.stream(replace(data, by_length=by_length)) for by_length in (False, True)
        )
        before, after = whole(case, plain, step), whole(case, sorted_, step)
        begin = 0
        for size in case.groups:
            for lane in range(case.lanes):
                rows = [row for row in range(begin, begin + size) if row % case.lanes == lane]
                assert {before[row] for row in rows} == {after[row] for row in rows}
                lengths = [sorted_.tokens(after[row]) for row in rows]
                assert lengths == sorted(lengths)
            begin += size


@settings(deadline=None, max_examples=25)
@given(case=cases(), step=st.integers(0, 40))
def test_epochs_count_what_was_shown_of_each_set(case: Case, step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stream = case.stream(case.write(Path(folder)))
        counts = Counter(ref.set for k in range(step) for ref in whole(case, stream, k))
        wanted = [counts[n] / len(one) for n, one in enumerate(stream.sets)]
        assert stream.epochs(step) == pytest.approx(wanted)


def test_sets_are_shown_whole_as_often_as_their_weights_say(tmp_path: Path) -> None:
    sets: list[list[Shard]] = [[(SHAPES[0], [3] * 6)] * 5, [(SHAPES[0], [3] * 7), (SHAPES[1], [2])]]
    case = Case(sets=sets, weights=(1.0, 2.5), batch=4, groups=[4])
    stream = case.stream(case.write(tmp_path))
    first, second = stream.epochs(2000)
    assert second / first == pytest.approx(2.5, rel=0.01)


def test_sets_of_one_size_are_mixed_each_in_its_own_order(tmp_path: Path) -> None:
    sets: list[list[Shard]] = [[(shape, [3] * 40) for shape in SHAPES[:2]]] * 2
    case = Case(sets=sets, weights=(1.0, 1.0), batch=160, groups=[160], by_length=False)
    refs = whole(case, case.stream(case.write(tmp_path)), 0)
    orders = [[ref.place for ref in refs if ref.set == number] for number in range(2)]
    assert min(map(len, orders)) > 60
    assert sum(one == other for one, other in zip(*orders, strict=False)) < 20


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_no_rank_reads_every_shard(tmp_path: Path, ranks: int) -> None:
    """In an epoch of one window for each shape: its part of the shards, and one at each border."""
    sets: list[list[Shard]] = [[(shape, [3] * 16) for shape in SHAPES[:2] for _ in range(16)]]
    case = Case(sets=sets, batch=16, groups=[8, 8])
    stream = case.stream(case.write(tmp_path))
    for rank in range(ranks):
        mine = range(rank, 16, ranks)
        refs = [ref for step in range(32) for ref in shown(stream, step, mine, case.groups)]
        for shape in SHAPES[:2]:
            bucket = stream.sets[0].manifest.buckets[shape]
            shards = {ref.shard for ref in refs if ref.shard in bucket and ref.epoch == 0}
            assert 0 < len(shards) <= 16 // ranks + 1


def padding(case: Case, data: Shards, micro_batch: int) -> float:
    """Return the part of all tokens that is padding, over some steps of one rank."""
    stream, real, padded = case.stream(data), 0, 0
    for step in range(8):
        lengths = [stream.tokens(ref) for ref in whole(case, stream, step)]
        for k in range(0, case.batch, micro_batch):
            real += sum(lengths[k : k + micro_batch])
            padded += micro_batch * max(lengths[k : k + micro_batch])
    return 1 - real / padded


def test_similar_lengths_share_a_micro_batch(tmp_path: Path) -> None:
    lengths = [10 + 37 * k % 190 for k in range(512)]
    shards = [(SHAPES[0], lengths[k : k + 32]) for k in range(0, 512, 32)]
    case = Case(sets=[shards], batch=128, groups=[64, 64], lanes=2)
    data = case.write(tmp_path)
    assert padding(case, replace(data, by_length=False), 8) > 0.4
    assert padding(case, data, 8) < 0.15
