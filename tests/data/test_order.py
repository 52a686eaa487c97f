from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow_train.data.order import locate

COUNTS = st.lists(st.integers(1, 7), min_size=1, max_size=9).map(tuple)


def epoch_of(
    epoch: int, *, seed: int, counts: tuple[int, ...], window: int
) -> list[tuple[int, int]]:
    total = sum(counts)
    positions = range(epoch * total, (epoch + 1) * total)
    return [locate(n, seed=seed, counts=counts, window=window) for n in positions]


@settings(deadline=None)
@given(
    counts=COUNTS, window=st.integers(1, 12), seed=st.integers(0, 2**40), epoch=st.integers(0, 5)
)
def test_each_epoch_shows_each_sample_once(
    counts: tuple[int, ...], window: int, seed: int, epoch: int
) -> None:
    seen = epoch_of(epoch, seed=seed, counts=counts, window=window)
    assert {e for e, _ in seen} == {epoch}
    assert sorted(index for _, index in seen) == list(range(sum(counts)))


@settings(deadline=None)
@given(counts=COUNTS, window=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_a_window_is_a_run_of_its_shards_samples(
    counts: tuple[int, ...], window: int, seed: int
) -> None:
    shard_of = [shard for shard, count in enumerate(counts) for _ in range(count)]
    left = [shard_of[i] for _, i in epoch_of(0, seed=seed, counts=counts, window=window)]
    while left:
        # Take shards until `window` of them have been begun; they must then be shown in full.
        begun = list(dict.fromkeys(left))[:window]
        size = sum(counts[shard] for shard in begun)
        assert sorted(left[:size]) == sorted(s for s in begun for _ in range(counts[s]))
        left = left[size:]


def test_seed_and_epoch_change_the_order() -> None:
    counts = (50, 50, 50)
    orders = [
        [index for _, index in epoch_of(epoch, seed=seed, counts=counts, window=2)]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_shards_are_mixed_within_a_window() -> None:
    order = [index for _, index in epoch_of(0, seed=0, counts=(100, 100), window=2)]
    from_first = sum(index < 100 for index in order[:100])
    assert 30 < from_first < 70


def test_the_order_is_this_one_for_good() -> None:
    order = [index for _, index in epoch_of(1, seed=3, counts=(3, 2, 4), window=2)]
    assert order == [2, 0, 5, 1, 8, 6, 7, 3, 4]
