"""Distances between sets of features: against closed forms, other formulas and real digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.evals import digits
from tests.evals.conftest import Real
from tests.evals.test_metrics import by_scipy, draw
from twinflow_train.evals import metrics
from twinflow_train.evals.judge import Judge
from twinflow_train.rng import generator


def by_eigenvalues(a: Tensor, b: Tensor) -> float:
    """The formula of torchmetrics: eigenvalues of the product of covariances, not symmetric."""
    p, q = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(p @ q).sqrt().real.sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + p.trace() + q.trace() - 2 * cross)


@pytest.mark.parametrize(("rows", "width"), [(100, 5), (500, 64)])
def test_three_formulas_of_the_frechet_distance_agree(rows: int, width: int) -> None:
    a, b = draw(rows, width, 1), draw(rows, width, 2) @ draw(width, width, 3) / 4 + 1
    ours = metrics.frechet(a, b)
    assert ours == pytest.approx(by_eigenvalues(a, b), rel=1e-9)
    assert ours == pytest.approx(by_scipy(a, b), rel=1e-6)


@pytest.mark.parametrize("scales", [torch.ones(8), torch.linspace(0.1, 3, 12)])
def test_the_bias_of_few_rows_is_as_it_is_said_to_be(scales: Tensor) -> None:
    """Equal Gaussians have the distance 0; what is measured is the bias alone."""
    n, m, width = 400, 600, len(scales)
    found = [
        metrics.frechet(draw(n, width, 2 * k) * scales, draw(m, width, 2 * k + 1) * scales)
        for k in range(60)
    ]
    said = metrics.frechet_bias(draw(100_000, width, 999) * scales, n, m)
    assert sum(found) / len(found) == pytest.approx(said, rel=0.06)


def test_the_bias_of_equal_variances_is_the_closed_form() -> None:
    rows = torch.cat([torch.eye(6), -torch.eye(6)]).double()  # covariance 2/11 on the diagonal
    closed = 2 / 11 * 6 * (6 + 5) / 4 * (1 / 50 + 1 / 70)
    assert metrics.frechet_bias(rows, 50, 70) == pytest.approx(closed, rel=1e-9)


def by_loops(a: Tensor, b: Tensor) -> float:
    """The kernel distance by its definition."""

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(a), len(b)
    first = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    second = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return first + second - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_the_kernel_distance_is_its_definition() -> None:
    a, b = draw(6, 3, 1), draw(9, 3, 2) + 0.5
    first, second = (
        torch.randperm(n, generator=generator("kernel-distance", side, n))
        for side, n in enumerate((6, 9))
    )
    blocks = [by_loops(a[first][k::3], b[second][k::3]) for k in range(3)]
    found = metrics.kernel_distance(a, b)
    assert found.value == pytest.approx(sum(blocks) / 3, rel=1e-9)
    assert found.error == pytest.approx(float(torch.tensor(blocks).std()) / 3**0.5, rel=1e-5)


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    found = [
        metrics.kernel_distance(draw(200, 8, 2 * k), draw(200, 8, 2 * k + 1)) for k in range(80)
    ]
    values = torch.tensor([each.value for each in found])
    standard = float(values.std())
    assert abs(float(values.mean())) < 3 * standard / 80**0.5
    assert float((values < 0).double().mean()) > 0.25, "unbiased, so often below 0"
    errors = sum(each.error for each in found) / 80
    assert errors == pytest.approx(standard, rel=0.3), "and its error is what it says"


def test_surroundings_are_their_definitions() -> None:
    fake, real, k = draw(40, 3, 1), draw(50, 3, 2) * 1.3, 3
    apart = [[float((x - y).norm()) for y in fake] for x in real]
    wide = [sorted(float((x - y).norm()) for y in real)[k] for x in real]
    slim = [sorted(float((x - y).norm()) for y in fake)[k] for x in fake]
    inside = [[apart[i][j] <= wide[i] for j in range(40)] for i in range(50)]
    found = metrics.neighbourhood(fake, real, k=k)
    assert found.precision == sum(any(row[j] for row in inside) for j in range(40)) / 40
    assert (
        found.recall == sum(any(apart[i][j] <= slim[j] for j in range(40)) for i in range(50)) / 50
    )
    assert found.density == pytest.approx(sum(map(sum, inside)) / 40 / k)
    assert found.coverage == sum(map(any, inside)) / 50


def test_surroundings_of_equal_distributions_are_as_expected() -> None:
    found = metrics.neighbourhood(draw(3000, 4, 1), draw(3000, 4, 2))
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    far = metrics.neighbourhood(draw(100, 4, 1) + 100, draw(100, 4, 2))
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    one_mode = metrics.neighbourhood(0.01 * draw(300, 4, 1), draw(300, 4, 2))
    assert one_mode.precision == 1
    assert one_mode.recall < 0.1
    assert one_mode.coverage < 0.3


def test_seeds_that_agree_have_no_diversity() -> None:
    one = draw(5, 8, 1)[:, None].expand(5, 4, 8)
    assert metrics.seed_diversity(one) == pytest.approx(0, abs=1e-12)
    corners = torch.eye(4)[None].expand(2, 4, 4)
    assert metrics.seed_diversity(corners) == pytest.approx(1)
    assert metrics.seed_diversity(torch.stack([one[:, 0], -one[:, 0]], 1)) == pytest.approx(2)
    assert math.isnan(metrics.seed_diversity(one[:, :1]))


def test_the_clip_score_is_a_hundred_cosines() -> None:
    images = torch.tensor([[1.0, 0], [1, 1], [-1, 0]])
    texts = torch.tensor([[2.0, 0], [1, 0], [1, 0]])
    assert metrics.clip_score(images, texts) == pytest.approx(100 * (1 + 0.5**0.5 + 0) / 3)


def test_what_cannot_be_compared_is_nan() -> None:
    a = draw(4, 3)
    broken = a.index_fill(0, torch.tensor([2]), math.nan)
    assert math.isnan(metrics.kernel_distance(a, broken).value)
    assert math.isnan(metrics.kernel_distance(a[:1], a).value)
    assert math.isnan(metrics.neighbourhood(a, a).recall)
    assert math.isnan(metrics.neighbourhood(broken, a, k=1).recall)


def test_all_distances_of_real_digits_order_the_damage(real: Real) -> None:
    judge, blur = Judge.load(real.judge), torch.nn.functional.avg_pool2d
    fresh, labels = (part[2::10] for part in digits.images())
    held = judge(digits.images()[0][::10])[1]
    noise = draw(500, 784).float().view(500, 1, 28, 28)
    damaged = {
        "clean": fresh,
        "blur 3": blur(fresh, 3, 1, 1),
        "blur 5": blur(fresh, 5, 1, 2),
        "noise .3": fresh + 0.3 * noise,
        "noise .8": fresh + 0.8 * noise,
        "means": digits.class_means()[labels],
    }
    features = {name: judge(images)[1] for name, images in damaged.items()}
    kernel = {name: metrics.kernel_distance(each, held) for name, each in features.items()}
    around = {name: metrics.neighbourhood(each, held) for name, each in features.items()}
    for kind in (("clean", "blur 3", "blur 5"), ("clean", "noise .3", "noise .8")):
        values = [kernel[name].value for name in kind]
        assert values == sorted(values)
        covered = [around[name].coverage for name in kind]
        assert covered == sorted(covered, reverse=True)
    assert abs(kernel["clean"].value) < 4 * kernel["clean"].error, "real against real is 0"
    assert kernel["blur 5"].value > 10 * kernel["blur 5"].error
    assert around["clean"].precision > 0.8
    assert around["clean"].recall > 0.8
    assert around["means"].recall < 0.05, "ten images do not reach what real ones do"
    by_class = features["clean"].view(10, 50, -1)
    shuffled = by_class.transpose(0, 1)
    assert metrics.seed_diversity(by_class) < 0.5 * metrics.seed_diversity(shuffled)
    classes = torch.stack([held[k * 50 : (k + 1) * 50].mean(0) for k in range(10)])
    right = metrics.clip_score(features["clean"], classes[labels])
    wrong = metrics.clip_score(features["clean"], classes[labels.roll(50)])
    assert right > wrong + 20, "prompts of other images fit worse"


def test_real_against_real_is_far_from_zero_with_few_images(real: Real) -> None:
    """The bias on real digits: the Frechet distance falls with their number, the other does not."""
    images, _ = digits.images()
    with torch.no_grad():
        features = Judge.load(real.judge)(images)[1]
    mixed = features[torch.randperm(5000, generator=generator("mixed"))]
    found, repeats = {}, 6
    for n in (50, 200, 400):
        pairs = [(mixed[2 * k * n : (2 * k + 1) * n], mixed[(2 * k + 1) * n : (2 * k + 2) * n])
                 for k in range(repeats)]  # fmt: skip
        found[n] = sum(metrics.frechet(one, two) for one, two in pairs) / repeats
        assert found[n] == pytest.approx(metrics.frechet_bias(features, n, n), rel=0.35), n
        kernels = [metrics.kernel_distance(one, two) for one, two in pairs]
        error = sum(each.error**2 for each in kernels) ** 0.5 / repeats
        assert abs(sum(each.value for each in kernels) / repeats) < 3 * error
    assert found[50] > 3 * found[200] > 5 * found[400]
