"""Fixed random tensors for the tests of this folder."""

import torch
from torch import Tensor

from twinflow_train.rng import generator


def normal(name: str, *shape: int) -> Tensor:
    """Draw N(0, I) in float64, the same for the same name and shape."""
    return torch.randn(shape, dtype=torch.float64, generator=generator("test", name))
