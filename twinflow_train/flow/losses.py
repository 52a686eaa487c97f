"""The distance between a prediction and its target, one number a sample."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.errors import check


@dataclass(kw_only=True)
class Distance:
    """Mean square, reweighted to grow as Barron's general robust loss (CVPR 2019) does.

    alpha = 1 is about the root mean square ("barron"); alpha = 2 the mean square over c, so
    alpha = 2 with c = 1 is the plain squared error ("l2").
    """

    alpha: float = 1.0
    c: float = 1e-3

    def __post_init__(self) -> None:
        finite = float("-inf") < self.alpha < float("inf")
        rules = ("c", 0 < self.c < float("inf"), "positive"), ("alpha", finite, "finite")
        check("distance", self, rules)

    def __call__(
        self, pred: Float[Tensor, "b *chw"], target: Float[Tensor, "b *chw"]
    ) -> Float[Tensor, " b"]:
        """Return sg[(m / (c^2 + 1e-8) / |alpha - 2| + 1)^((alpha - 2) / 2)] m / c; m: mean square.

        Computed in at least float32, whatever the network computes in; float64 stays float64.
        """
        dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
        m = (pred.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
        if self.alpha == 2:
            return m / self.c
        scaled = m.detach() / (self.c**2 + 1e-8) / abs(self.alpha - 2)
        return (scaled + 1) ** ((self.alpha - 2) / 2) * m / self.c


def l2() -> Distance:
    """Return the plain squared error."""
    return Distance(alpha=2.0, c=1.0)
