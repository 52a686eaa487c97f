from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow_train.data.order import Order

COUNTS = st.lists(st.integers(1, 7), min_size=1, max_size=9).map(tuple)
LANES = st.sampled_from([1, 2, 4, 8])


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    """List (shard, place) of an epoch's samples, in order."""
    total = sum(order.counts)
    found = [order.locate(n) for n in range(epoch * total, (epoch + 1) * total)]
    assert {e for e, _, _ in found} == {epoch}
    return [(shard, place) for _, shard, place in found]


def windows(order: Order, epoch: int) -> Iterator[list[tuple[int, int]]]:
    """Cut an epoch where `window` more shards have been shown."""
    left = epoch_of(order, epoch)
    while left:
        begun = list(dict.fromkeys(shard for shard, _ in left))[: order.window]
        size = sum(order.counts[shard] for shard in begun)
        yield left[:size]
        left = left[size:]


@settings(deadline=None)
@given(
    counts=COUNTS,
    window=st.integers(1, 12),
    lanes=LANES,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_each_sample_once_window_after_window(
    counts: tuple[int, ...], window: int, lanes: int, seed: int, epoch: int
) -> None:
    order = Order(seed=seed, counts=counts, window=window, lanes=lanes)
    shown = []
    for part in windows(order, epoch):
        shards = {shard for shard, _ in part}
        assert sorted(part) == [(s, n) for s in sorted(shards) for n in range(counts[s])]
        shown.append(len(shards))
    assert sum(shown) == len(counts)
    assert set(shown[:-1]) <= {window}
    assert shown[-1] <= window


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=20).map(tuple),
    window=st.integers(1, 12),
    lanes=LANES,
    share=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_ranks_read_ranges_of_a_window_that_do_not_meet(
    counts: tuple[int, ...], window: int, lanes: int, share: int, epoch: int
) -> None:
    """Ranges in a row touch as many shards as there are, and one more at each border."""
    order = Order(seed=1, counts=counts, window=window, lanes=lanes)
    ranks, position = max(1, lanes >> share), epoch * sum(counts)
    for part in windows(order, epoch):
        mine = [
            {shard for n, (shard, _) in enumerate(part, position) if n % ranks == rank}
            for rank in range(ranks)
        ]
        shards = {shard for shard, _ in part}
        assert sum(map(len, mine)) <= len(shards) + ranks - 1
        position += len(part)


def test_no_rank_reads_every_shard_of_a_window() -> None:
    order = Order(seed=1, counts=(50,) * 16, window=16, lanes=8)
    for ranks, most in ((2, 9), (4, 5), (8, 3), (16, 3)):
        for rank in range(ranks):
            shards = {order.locate(n)[1] for n in range(rank, 800, ranks)}
            assert len(shards) <= most


def test_seed_epoch_and_path_change_the_order() -> None:
    orders = [
        Order(seed=seed, counts=(50, 50, 50), window=2, path=path)
        for seed in (0, 1)
        for path in ((), (1, 0))
    ]
    found = [tuple(epoch_of(order, epoch)) for order in orders for epoch in (0, 1)]
    assert len(set(found)) == 8


@pytest.mark.parametrize("lanes", [1, 4])
def test_shards_are_mixed_within_a_window(lanes: int) -> None:
    order = epoch_of(Order(seed=0, counts=(100, 100), window=2, lanes=lanes), 0)
    assert 30 < sum(shard == 0 for shard, _ in order[:100]) < 70


@pytest.mark.parametrize(
    ("lanes", "places"),
    [
        (1, "0.2 0.0 2.0 0.1 2.3 2.1 2.2 1.0 1.1"),
        (2, "0.2 2.0 0.0 2.1 0.1 2.2 2.3 1.0 1.1"),
    ],
)
def test_the_order_is_this_one_for_good(lanes: int, places: str) -> None:
    order = Order(seed=3, counts=(3, 2, 4), window=2, lanes=lanes)
    assert " ".join(f"{shard}.{place}" for shard, place in epoch_of(order, 1)) == places
