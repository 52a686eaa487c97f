"""How times are drawn and how much each pair of times weighs."""

import math

import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor

from twinflow_train.batch import Times


def beta_quantile(u: Times, a: float, b: float) -> Times:
    """Return the Beta(a, b) quantiles of u in [0, 1], a CPU tensor (u itself if a = b = 1)."""
    if a == b == 1:
        return u
    return torch.from_numpy(betaincinv(a, b, u.double().numpy())).to(u.dtype)


def stratify(u: Times, rank_of_row: Int[Tensor, " b"], rows: int) -> Times:
    """Return (rank + u) / rows: one uniform draw in each of `rows` equal strata of [0, 1).

    Where the ranks are a random permutation of 0 .. rows - 1, each draw alone stays uniform and
    the mean over a batch varies less.
    """
    below_one = 1 - torch.finfo(u.dtype).eps / 2  # rounding must not turn .9999999 into 1
    return ((rank_of_row + u.double()) / rows).to(u.dtype).clamp(max=below_one)


def time_weight(t: Times, r: Times) -> Float[Tensor, " b"]:
    """Return tan((1 - (|t| - |r|)) pi / 2.5) + 1, for |r| <= |t|: 1 at distance 1, 4.08 at 0.

    Source: the published TwinFlow training step (UCGM, arXiv 2505.07447, weights alike).
    """
    return torch.tan((1 - (t.abs() - r.abs())) * (math.pi / 2.5)) + 1
