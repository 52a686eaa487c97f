from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from twinflow_train.dist import World
from twinflow_train.evals.deal import Deal


def deals(count: int, size: int) -> list[Deal]:
    cpu = torch.device("cpu")
    return [
        Deal(count=count, world=World(rank=rank, size=size, device=cpu)) for rank in range(size)
    ]


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 60))
def test_every_row_is_dealt_and_every_rank_makes_the_same_calls(
    count: int, size: int, rows: int
) -> None:
    hands = deals(count, size)
    shapes = {tuple(len(chunk) for chunk in hand.chunks(rows)) for hand in hands}
    assert len(shapes) == 1
    assert max(shapes.pop()) <= rows
    dealt = [number for hand in hands for number in hand.mine]
    assert set(dealt) == set(range(count))
    assert len(dealt) < count + size


def test_one_rank_collects_its_own_rows_in_order() -> None:
    (deal,) = deals(5, 1)
    rows = torch.arange(10.0).view(5, 2)
    assert torch.equal(deal.collect(rows), rows)
