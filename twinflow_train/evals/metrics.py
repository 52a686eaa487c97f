"""How far generated images are from real ones: pure functions of a judge's features and logits.

A number that the given rows do not define (too few of them, or values that are not finite) is nan.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frechet(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson and Landau 1982; Heusel et al.
    2017), in float64. The symmetric product needs only eigenvalues of symmetric matrices, so
    singular covariances (fewer rows than features) are harmless. The estimate grows as rows get
    fewer: compare only distances of equally many rows.
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
