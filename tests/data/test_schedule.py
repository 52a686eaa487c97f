from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow_train.data.schedule import had, turns

RATES = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)
PATH = ("test", 1)


@settings(deadline=None)
@given(rates=RATES, first=st.integers(0, 400), count=st.integers(1, 40))
def test_any_turn_is_found_without_those_before_it(
    rates: list[float], first: int, count: int
) -> None:
    whole = turns(0, first + count, rates=rates, path=PATH)
    assert turns(first, count, rates=rates, path=PATH) == whole[first:]
    assert had(first, rates=rates, path=PATH) == [
        sum(stream == which for stream, _ in whole[:first]) for which in range(len(rates))
    ]


@settings(deadline=None)
@given(rates=RATES, first=st.integers(0, 10**12))
def test_each_stream_takes_its_own_turns_one_after_the_other(
    rates: list[float], first: int
) -> None:
    own = had(first, rates=rates, path=PATH)
    assert sum(own) == first
    for stream, turn in turns(first, 30, rates=rates, path=PATH):
        assert turn == own[stream]
        own[stream] += 1


@settings(deadline=None)
@given(rates=RATES, first=st.integers(0, 3000))
def test_shares_are_those_of_the_rates(rates: list[float], first: int) -> None:
    """Two streams: to within one turn; each further one adds its part of one."""
    for rate, own in zip(rates, had(first, rates=rates, path=PATH), strict=True):
        share = rate / sum(rates)
        assert abs(own - first * share) < 1 + share * max(0, len(rates) - 2) + 1e-6


def test_streams_of_equal_rates_do_not_simply_alternate() -> None:
    order = [stream for stream, _ in turns(0, 400, rates=[1, 1], path=PATH)]
    pairs = Counter(pairwise(order))
    assert min(pairs.values()) > 20
    assert order != [stream for stream, _ in turns(0, 400, rates=[1, 1], path=("test", 2))]
