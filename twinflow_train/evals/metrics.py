"""How far generated images are from real ones: pure functions of a judge's features and logits.

A number that the given rows do not define (too few of them, or values that are not finite) is nan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twinflow_train.rng import generator

BLOCKS, BLOCK_ROWS = 10, 1000
"""Blocks of the kernel distance at least, and rows of one of them at most."""
NEIGHBOURS = 5
"""The nearest neighbour whose distance is the radius of a row's surroundings (Naeem et al.)."""


def frechet(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson and Landau 1982; Heusel et al.
    2017), in float64. The symmetric product needs only eigenvalues of symmetric matrices, so
    singular covariances (fewer rows than features) are harmless. The estimate grows as rows get
    fewer: compare only distances of equally many rows, and see `frechet_bias`.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2 or not bool(a.isfinite().all() and b.isfinite().all()):
        return math.nan
    cov_a, cov_b = covariance(a), covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_bias(rows: Float[Tensor, "k features"], n: int, m: int) -> float:
    """Return what `frechet` of n and m rows of one distribution comes to, though its distance is 0.

    (1/n + 1/m) (tr C + 1/2 sum_ij (1 + [i = j]) c_i c_j / (c_i + c_j)), with the eigenvalues c of
    the covariance C of `rows`, is its expectation to first order for Gaussian features: the means
    differ by noise of covariance C (1/n + 1/m), and the second term is the Bures distance of two
    Wishart covariances. With d equal eigenvalues c it is c d (d + 5) / 4 (1/n + 1/m).
    """
    values = torch.linalg.eigvalsh(covariance(rows.double())).clamp(min=0)
    values = values[values > values.max() * 1e-12]
    pairs = values[:, None] * values / (values[:, None] + values)
    spread = values.sum() + (pairs.sum() + pairs.diagonal().sum()) / 2
    return float(spread * (1 / n + 1 / m))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel distance and the standard error of its estimate; both can be below, at or above 0.

    value: its expectation is 0 for two sets of one distribution. error: nan with fewer than two
    blocks.
    """

    value: float
    error: float


def kernel_distance(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> Kernel:
    """Return the kernel distance (KID; Binkowski et al. 2018) of two sets of features.

    The unbiased square of the maximum mean discrepancy under k(x, y) = (x y / features + 1)^3,
    averaged over disjoint blocks of rows in fixed random orders. Unlike `frechet` it has no bias
    of few rows where rows were drawn independently; sets with exactly so many of each class come
    out slightly below 0.
    """
    a, b = a.double(), b.double()
    fewest = min(len(a), len(b))
    if fewest < 2 or not bool(a.isfinite().all() and b.isfinite().all()):
        return Kernel(value=math.nan, error=math.nan)
    blocks = max(min(BLOCKS, fewest // 2), -(-fewest // BLOCK_ROWS))
    # Orders of their own: sets in the same order of class would meet class by class.
    a, b = (rows[_order(side, len(rows))] for side, rows in enumerate((a, b)))
    found = torch.stack([_discrepancy(a[k::blocks], b[k::blocks]) for k in range(blocks)])
    error = float(found.std() / blocks**0.5) if blocks > 1 else math.nan
    return Kernel(value=float(found.mean()), error=error)


def _order(side: int, count: int) -> Int[Tensor, " count"]:
    """Return a random order of one side's rows, the same every time."""
    return torch.randperm(count, generator=generator("kernel-distance", side, count))


def _discrepancy(
    a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]
) -> Float[Tensor, ""]:
    """Return the unbiased square of the maximum mean discrepancy."""
    within = []
    for rows in (a, b):
        table, count = (rows @ rows.T / rows.shape[1] + 1) ** 3, len(rows)
        within.append((table.sum() - table.trace()) / (count * (count - 1)))
    return within[0] + within[1] - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).mean()


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Who lies in whose surroundings, the ball up to a row's k-th neighbour of its own set.

    precision: share of generated rows within surroundings of real ones. recall: the reverse
    (Kynkaanniemi et al. 2019). density: how many real surroundings hold a generated row, over k;
    coverage: share of real rows whose surroundings hold a generated one (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhood(
    fake: Float[Tensor, "n features"], real: Float[Tensor, "m features"], *, k: int = NEIGHBOURS
) -> Neighbourhood:
    """Compare two sets by their rows' surroundings; nan with no more than k rows in one of them.

    For two large sets of one distribution density is 1 and coverage 1 - 2^-k; precision and recall
    depend on the number of rows: compare only equally many.
    """
    fake, real = fake.double(), real.double()
    if min(len(fake), len(real)) <= k or not bool(fake.isfinite().all() and real.isfinite().all()):
        return Neighbourhood(
            precision=math.nan, recall=math.nan, density=math.nan, coverage=math.nan
        )
    around_real, around_fake = _radii(real, k), _radii(fake, k)
    held, reached = torch.zeros(len(fake)), torch.zeros(len(fake), dtype=torch.bool)
    inside, covered = [], []
    for rows in torch.arange(len(real)).split(BLOCK_ROWS):
        apart = torch.cdist(real[rows], fake)
        within = apart <= around_real[rows, None]
        held += within.sum(0).cpu()
        reached |= within.any(0).cpu()
        covered.append(within.any(1))
        inside.append((apart <= around_fake).any(1))
    return Neighbourhood(
        precision=float(reached.double().mean()),
        recall=float(torch.cat(inside).double().mean()),
        density=float(held.double().mean() / k),
        coverage=float(torch.cat(covered).double().mean()),
    )


def _radii(rows: Float[Tensor, "n features"], k: int) -> Float[Tensor, " n"]:
    """Return each row's distance to its k-th nearest other row."""
    found = [
        torch.cdist(rows[part], rows).kthvalue(k + 1, dim=1).values
        for part in torch.arange(len(rows)).split(BLOCK_ROWS)
    ]
    return torch.cat(found)


def seed_diversity(features: Float[Tensor, "prompts seeds features"]) -> float:
    """Return how unlike the images of one prompt are: 1 - cosine, over pairs and then prompts.

    0 where all seeds give the same image; nan with one seed.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    seeds = features.shape[1]
    if seeds < 2 or not bool(features.isfinite().all()):
        return math.nan
    alike = (unit @ unit.transpose(1, 2)).sum((1, 2)) - seeds
    return float((1 - alike / (seeds * (seeds - 1))).mean())


def clip_score(images: Float[Tensor, "n features"], texts: Float[Tensor, "n features"]) -> float:
    """Return the mean of 100 max(cosine, 0) of each image and its own prompt (Hessel et al. 2021).

    torchmetrics reports the same number; the paper's w is 2.5 where this is 100.
    """
    pairs = torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=-1)
    return float(100 * pairs.clamp(min=0).mean()) if len(pairs) else math.nan


def covariance(rows: Float[Tensor, "n features"]) -> Float[Tensor, "features features"]:
    """Return the unbiased covariance of rows."""
    centred = rows - rows.mean(0)
    return centred.T @ centred / (len(rows) - 1)


def accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """Return the share of rows whose largest logit is the label's; rows not finite are wrong."""
    right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
    return float(right.double().mean())


def diversity(
    features: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"],
    real_features: Float[Tensor, "m features"],
    real_labels: Int[Tensor, " m"],
) -> float:
    """Return the within-class spread of features over that of real ones: 1 is as varied as real.

    Spread is the trace of a class's covariance, averaged over the classes that have at least two
    rows on both sides.
    """
    shared = [
        label
        for label in real_labels.unique().tolist()
        if min(int((labels == label).sum()), int((real_labels == label).sum())) >= 2
    ]
    if not shared:
        return math.nan
    return _spread(features, labels, shared) / _spread(real_features, real_labels, shared)


def _spread(
    features: Float[Tensor, "n features"], labels: Int[Tensor, " n"], classes: list[int]
) -> float:
    """Return the mean over classes of the trace of the within-class covariance."""
    traces = [features[labels == c].double().var(0).sum() for c in classes]
    return float(torch.stack(traces).mean())
