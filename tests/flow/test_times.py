import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betainc

from twinflow_train.flow.times import beta_quantile, stratify, time_weight
from twinflow_train.rng import generator


def test_uniform_draws_stay_as_they_are() -> None:
    u = torch.tensor([0.0, 0.3, 1.0])
    assert beta_quantile(u, 1.0, 1.0) is u


@given(st.floats(0.2, 5), st.floats(0.2, 5), st.floats(0.01, 0.99))
def test_the_quantile_inverts_the_distribution(a: float, b: float, u: float) -> None:
    t = beta_quantile(torch.tensor([u], dtype=torch.float64), a, b)
    assert 0 <= t.item() <= 1
    assert betainc(a, b, t.item()) == pytest.approx(u, abs=1e-9)


def test_the_quantile_keeps_the_dtype_and_its_argument() -> None:
    u = torch.tensor([0.0, 0.5, 1.0])
    t = beta_quantile(u, 2.0, 2.0)
    assert t.dtype == torch.float32
    assert t.tolist() == [0.0, 0.5, 1.0]
    assert u.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_stratum_holds_one_draw(dtype: torch.dtype) -> None:
    rows = 1000
    random = generator("test", "strata")
    ranks = torch.randperm(rows, generator=random)
    u = torch.rand(rows, dtype=dtype, generator=random)
    t = stratify(u, ranks, rows)
    assert t.dtype == dtype
    assert (t * rows).floor().long().sort().values.equal(torch.arange(rows))


def test_no_stratified_draw_rounds_up_to_one() -> None:
    u = torch.tensor([1 - 2**-24])
    assert stratify(u, torch.tensor([2**20 - 1]), 2**20).item() < 1


def test_each_rank_alone_is_uniform() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    every = torch.cat([stratify(u, torch.full((100,), rank), 4) for rank in range(4)])
    torch.testing.assert_close(every, torch.arange(400, dtype=torch.float64) / 400)


def test_the_weight_falls_with_the_distance_whatever_the_signs() -> None:
    t = torch.tensor([1.0, 0.7, -0.7, 0.5], dtype=torch.float64)
    r = torch.tensor([0.0, 0.2, 0.2, 0.5], dtype=torch.float64)
    half, diagonal = math.tan(0.5 * math.pi / 2.5) + 1, math.tan(math.pi / 2.5) + 1
    expected = torch.tensor([1.0, half, half, diagonal], dtype=torch.float64)
    torch.testing.assert_close(time_weight(t, r), expected)
    assert diagonal == pytest.approx(4.0777, abs=1e-4)
