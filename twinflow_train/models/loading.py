"""A whole network on one device, for sampling."""

from __future__ import annotations

import torch

from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.weights import Weights


@torch.no_grad()
def filled(
    model: Model, weights: Weights, *, device: torch.device, dtype: torch.dtype
) -> VelocityNet:
    """Build a network whole on one device; no more than one tensor at a time is in host memory."""
    net = model.build().to(dtype).to_empty(device=device).requires_grad_(False)
    net.rebuild_constants()
    for name, parameter in net.named_parameters():
        shape = parameter.shape
        parameter.copy_(weights.read(net.stored_name(name), shape, 0, shape[0]))
    return net.eval()
