"""Two times through one timestep argument: nothing is lost, and the diagonal is untouched."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from twinflow_train.models.two_times import (
    Clock,
    ShiftedTime,
    TwoTimes,
    own_time,
    pack_times,
    thousandths,
    unpack_times,
)

SMALLEST_EXACT = 2.0**-110
"""Below it the last of a float32's 24 bits is under the smallest bfloat16."""

TIMES = st.floats(-1, 1, width=32)


def stock_embedder(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        embedder: nn.Module = QwenTimestepProjEmbeddings(embedding_dim=16)
        return embedder


def two_times(*, clock: Clock = own_time) -> TwoTimes:
    """Two embedders that differ, as after some training."""
    both = TwoTimes(stock_embedder(), clock=clock)
    both.embed_r.load_state_dict(stock_embedder(1).state_dict())
    return both


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=40))
@example([(0.999, 1.0), (-0.999, 1 - 2**-24), (0.0, -0.0), (1.0, -1.0), (2**-24, 1 / 3)])
def test_every_time_comes_back_exactly(pairs: list[tuple[float, float]]) -> None:
    t, r = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    packed = pack_times(t, r)
    assert packed.dtype == torch.bfloat16
    # What a stock model does to its timestep before it embeds it: a cast to its own type.
    for cast in (torch.bfloat16, torch.float32):
        for time, back in zip((t, r), unpack_times(packed.to(cast)), strict=True):
            assert back.dtype == torch.float32
            lost = (back.double() - time.double()).abs()
            assert bool((lost <= torch.where(time.abs() < SMALLEST_EXACT, 2.0**-133, 0)).all())


def test_float64_times_are_rounded_to_float32() -> None:
    t = torch.tensor([0.1, 1 / 3, 0.9999999], dtype=torch.float64)
    back, _ = unpack_times(pack_times(t, t))
    assert torch.equal(back, t.float())


def test_on_the_diagonal_only_the_first_embedder_speaks() -> None:
    both, hidden = two_times(), torch.zeros(5, 1)
    t = torch.tensor([-1.0, -0.3, 0.0, 0.123456789, 1.0])
    assert torch.equal(both(pack_times(t, t), hidden), both.embed(t, hidden))


def test_off_the_diagonal_the_second_embedder_comes_in_by_the_gap() -> None:
    both, hidden = two_times().double(), torch.zeros(4, 1, dtype=torch.float64)
    t = torch.tensor([1.0, 0.7, 0.7, -0.2])
    r = torch.tensor([0.0, 0.1, 0.9, -0.8])
    gap = (t.double() - r.double())[:, None]
    expected = both.embed(t, hidden) + gap * both.embed_r(r, hidden)
    torch.testing.assert_close(both(pack_times(t, r), hidden), expected, rtol=1e-6, atol=1e-7)


def test_times_are_scaled_to_the_stock_embedders_unit() -> None:
    thousand, hidden = two_times(clock=thousandths), torch.zeros(3, 1)
    t, r = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0.125, 0.0, 1.0])
    expected: Tensor = thousand.embed(1000 * t, hidden)
    expected = expected + (t - r)[:, None] * thousand.embed_r(1000 * r, hidden)
    assert torch.equal(thousand(pack_times(t, r), hidden), expected)


def test_the_second_embedder_starts_as_a_copy_with_parameters_of_its_own() -> None:
    both = TwoTimes(stock_embedder())
    pairs = list(zip(both.embed.parameters(), both.embed_r.parameters(), strict=True))
    assert pairs
    for first, second in pairs:
        assert first is not second
        assert torch.equal(first, second)


def test_of_an_embedder_that_gives_several_tensors_each_is_such_a_sum() -> None:
    both = TwoTimes(AdaLayerNormSingle(16), clock=thousandths)
    for parameter in both.embed_r.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    t, r = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0.125, 0.0, 1.0])
    named = {"batch_size": 3, "hidden_dtype": torch.float32}
    found = both(pack_times(t, r), **named)
    first, second = both.embed(1000 * t, **named), both.embed_r(1000 * r, **named)
    assert [part.shape for part in found] == [(3, 96), (3, 16)]
    for sums, a, b in zip(found, first, second, strict=True):
        torch.testing.assert_close(sums, a + (t - r)[:, None] * b)
        assert torch.equal(sums[2], a[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_has_the_type_of_the_network(dtype: torch.dtype) -> None:
    t = torch.tensor([0.4])
    hidden = torch.zeros(1, 1, dtype=dtype)
    assert two_times().to(dtype)(pack_times(t, 0 * t), hidden).dtype == dtype


def test_shifted_times_go_through_the_one_embedder() -> None:
    shifted, context = ShiftedTime(stock_embedder()), torch.zeros(3, 16)
    t, r = torch.tensor([1.0, 0.5, -0.7]), torch.tensor([0.0, 0.5, -0.7])
    want = stock_embedder()(t - r / 2, context)
    assert torch.equal(shifted(pack_times(t, r), context), want)
    # What is published is not injective: (1, 1) and (0.5, 0) meet.
    meet = shifted(pack_times(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0])), context[:2])
    assert torch.equal(*meet)


def test_on_its_own_clock_the_target_time_is_not_seen() -> None:
    shifted, context = ShiftedTime(stock_embedder()), torch.zeros(2, 16)
    shifted.own_clock = True
    t = torch.tensor([0.8, 0.3])
    for r in (t, 0 * t):
        assert torch.equal(shifted(pack_times(t, r), context), stock_embedder()(t, context))
