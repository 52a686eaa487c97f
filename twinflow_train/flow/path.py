"""The straight path between data (time 0) and noise (|time| 1); F is dx_t/dt = noise - data.

Everything is computed in at least float32, returned in the first tensor's dtype, and no argument
is written to.  Source: TwinFlow, arXiv 2512.05150, section 3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Times


def expand(t: Times, like: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *ones"]:
    """Broadcast times (b,) over the trailing axes of `like`, in the wider dtype of the two."""
    dtype = torch.promote_types(torch.promote_types(t.dtype, like.dtype), torch.float32)
    return t.to(dtype).reshape(-1, *[1] * (like.ndim - 1))


def interpolate(
    data: Float[Tensor, "b *chw"], noise: Float[Tensor, "b *chw"], t: Times
) -> Float[Tensor, "b *chw"]:
    """Return x_t = |t| noise + (1 - |t|) data."""
    at = expand(t, data).abs()
    return (at * noise + (1 - at) * data).to(data.dtype)


def recover(
    x_t: Float[Tensor, "b *chw"], F: Float[Tensor, "b *chw"], t: Times
) -> tuple[Float[Tensor, "b *chw"], Float[Tensor, "b *chw"]]:
    """Return (x_hat, z_hat), the data and the noise on the line through x_t with slope F."""
    at = expand(t, x_t).abs()
    return (x_t - at * F).to(x_t.dtype), (x_t + (1 - at) * F).to(x_t.dtype)


def jump(
    x_t: Float[Tensor, "b *chw"], F: Float[Tensor, "b *chw"], t: Times, r: Times
) -> Float[Tensor, "b *chw"]:
    """Return x_r = x_t - (t - r) F, which is r z_hat + (1 - r) x_hat, for 0 <= r <= t."""
    return (x_t - (expand(t, x_t) - expand(r, x_t)) * F).to(x_t.dtype)
