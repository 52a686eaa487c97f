"""Rounding at random: exact where it can be, right on average, and new at every update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twinflow_train.engines.rounding import keys, rounded, scramble

NUMBERS, UPDATES = 1 << 14, 64
SIGMAS = 5
"""Of the mean of so many draws: a right program fails once in two million."""


def draws(values: Tensor, *, updates: int = UPDATES) -> Tensor:
    """Round the same values at several updates."""
    found = [rounded(values, keys(torch.tensor(n), 1)[0], 0).float() for n in range(updates)]
    return torch.stack(found)


def test_what_bfloat16_holds_stays() -> None:
    held = torch.tensor([0.0, -0.0, 1.0, -1.0, 2**-126, 3.0e38, math.inf, -math.inf])
    held = torch.cat([held, torch.linspace(-7, 7, 1000)]).to(torch.bfloat16)
    assert torch.equal(draws(held.float()), held.float().expand(UPDATES, -1))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e20])
def test_other_numbers_go_to_a_neighbour_and_stay_on_average(scale: float) -> None:
    values = scale * torch.linspace(-2, 2, NUMBERS + 1)[:-1]
    below = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    found = draws(values)
    assert bool(((found == below) | (found == above)).all())
    step = (above - below).double()
    part = (values.double() - below) / step
    off = (found.double() - values).div(step).where(step != 0, 0.0)
    spread = (part * (1 - part)).clamp(min=0)
    # Over all, and of each sixteenth of the way between neighbours by itself.
    assert off.mean().abs() < SIGMAS * spread.mean().div(off.numel()).sqrt()
    for low in range(16):
        some = (part >= low / 16) & (part < (low + 1) / 16)
        allowed = SIGMAS * spread[some].mean().div(int(some.sum()) * UPDATES).sqrt()
        assert off[:, some].mean().abs() < allowed


def test_draws_of_neighbours_updates_and_tensors_have_nothing_in_common() -> None:
    value = torch.full((NUMBERS,), 1 + 2**-8)  # halfway between two neighbours
    up = 2 * (draws(value) > 1).double() - 1
    other = 2 * (rounded(value, keys(torch.tensor(3), 9)[7], 0) > 1).double() - 1

    def together(one: Tensor, two: Tensor) -> float:
        return float((one * two).mean()) * math.sqrt(one.numel())

    assert abs(together(up[:, 1:], up[:, :-1])) < SIGMAS
    assert abs(together(up[:, 256:], up[:, :-256])) < SIGMAS
    assert abs(together(up[1:], up[:-1])) < SIGMAS
    assert abs(together(up[3], other)) < SIGMAS
    assert up.unique(dim=0).shape == up.shape


def test_a_tensor_rounds_alike_in_pieces_and_at_every_time() -> None:
    values, key = torch.linspace(0, 1, 1000), keys(torch.tensor(5), 3)[1]
    whole = rounded(values, key, 0)
    pieces = [rounded(values[low : low + 300], key, low) for low in range(0, 1000, 300)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(rounded(values.view(10, 100), key, 0).flatten(), whole)


def test_numbers_are_scrambled_one_to_one() -> None:
    some = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    assert len(scramble(some).unique()) == len(some)
    # The last step of MurmurHash3 by its definition, without signs.
    want = []
    for x in (1, 2, 0x12345678):
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        want.append(x ^ (x >> 16))
    got = scramble(torch.tensor([1, 2, 0x12345678], dtype=torch.int32))
    assert [int(x) & 0xFFFFFFFF for x in got] == want
