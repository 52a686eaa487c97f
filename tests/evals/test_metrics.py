from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.evals import digits
from tests.evals.conftest import Real
from twinflow_train.evals import metrics
from twinflow_train.evals.judge import Judge, labelled


def draw(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def with_moments(mean: Tensor, cov: Tensor, rows: int = 50) -> Tensor:
    """Make rows whose sample mean and covariance are exactly these."""
    raw = draw(rows, len(mean))
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(metrics.covariance(raw)), raw.T, upper=False
    ).T
    return white @ torch.linalg.cholesky(cov).T + mean


def by_scipy(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    p, q = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(p @ q).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(p + q - 2 * root))


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    a = with_moments(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double())
    b = with_moments(
        torch.tensor([1.0, 2.0, 0.0]).double(),
        torch.diag(torch.tensor([4.0, 4.0, 1.0])).double(),
    )
    # |mean|^2 + sum (std - std')^2
    assert metrics.frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(200, 8), (300, 64)])
def test_frechet_equals_scipys_matrix_square_root(rows: int, width: int) -> None:
    a = draw(rows, width, 1)
    b = draw(rows, width, 2) @ (torch.eye(width) + 0.3 * draw(width, width, 3)) + 0.5
    assert metrics.frechet(a, b) == pytest.approx(by_scipy(a, b), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero_even_when_singular() -> None:
    few = draw(10, 64)
    assert metrics.frechet(few, few) == pytest.approx(0, abs=1e-5)
    assert metrics.frechet(few, few + 1) == pytest.approx(64, rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(3, 40), st.integers(1, 12))
def test_frechet_is_symmetric_not_negative_and_blind_to_order(
    seed: int, rows: int, width: int
) -> None:
    a, b = draw(rows, width, seed), 2 * draw(rows + 1, width, seed + 1)
    forward = metrics.frechet(a, b)
    assert forward >= 0
    assert metrics.frechet(b, a) == pytest.approx(forward, rel=1e-6, abs=1e-6)
    assert metrics.frechet(a.flip(0), b) == pytest.approx(forward, rel=1e-6, abs=1e-6)


def test_what_is_undefined_is_nan() -> None:
    a = draw(5, 3)
    assert math.isnan(metrics.frechet(a[:1], a))
    assert math.isnan(metrics.frechet(a.index_fill(0, torch.tensor([2]), math.nan), a))
    assert math.isnan(metrics.diversity(a, torch.arange(5), a, torch.arange(5)))


def test_accuracy_counts_what_is_not_finite_as_wrong() -> None:
    logits = torch.eye(4)
    logits[0, 1] = math.nan
    assert metrics.accuracy(logits, torch.tensor([0, 1, 2, 0])) == 0.5


def test_diversity_is_the_ratio_of_within_class_variances() -> None:
    real = draw(400, 6)
    labels = torch.arange(400) % 4
    moved = 0.5 * real + 10.0 * labels[:, None]
    assert metrics.diversity(moved, labels, real, labels) == pytest.approx(0.25, rel=1e-9)
    one_class = metrics.diversity(moved[:1], labels[:1], real, labels)
    assert math.isnan(one_class)


def test_distances_of_real_digits_grow_with_the_damage(real: Real) -> None:
    judge = Judge.load(real.judge)
    fresh, labels = (part[2::10] for part in digits.images())
    held, held_labels = labelled(real.heldout)

    def of(images: Tensor) -> tuple[float, float, float]:
        logits, features = judge(images)
        features_held = judge(held)[1]
        return (
            metrics.frechet(features, features_held),
            metrics.accuracy(logits, labels),
            metrics.diversity(features, labels, features_held, held_labels),
        )

    noise = draw(500, 784).float().view(500, 1, 28, 28)
    blur = torch.nn.functional.avg_pool2d
    clean = of(fresh)
    blurred = [of(blur(fresh, k, 1, k // 2)) for k in (3, 5)]
    noisy = [of(fresh + s * noise) for s in (0.3, 0.8)]
    means = of(digits.class_means()[labels])
    for first, second in (blurred, noisy):
        assert clean[0] < first[0] < second[0]
    assert clean[1] > 0.97
    assert noisy[1][1] < clean[1]
    assert means[1] > 0.7, "most class means are recognised"
    assert means[2] < 1e-6, "but all alike"
    assert means[0] > 10 * clean[0]
    assert clean[2] == pytest.approx(1, abs=0.15)
    shuffled = metrics.accuracy(judge(fresh.roll(50, 0))[0], labels)
    assert shuffled < 0.05, "the right images for the wrong prompts"
    assert metrics.frechet(judge(fresh.roll(50, 0))[1], judge(held)[1]) == pytest.approx(
        clean[0], rel=1e-3
    ), "which a distance cannot see"
