"""Random initial values that suit most layers; families say where theirs differ."""

from __future__ import annotations

import math

import torch


def plain(name: str, shape: torch.Size) -> tuple[str, float]:
    """Start biases at 0, norms' scales at 1, matrices at Xavier's spread, convolutions at theirs.

    A convolution's is one over the root of the numbers that go into each of its outputs, so that a
    depthwise one, with few of them, is not drowned. For the form see `RandomWeights`.
    """
    if len(shape) == 1:
        return "constant", 0.0 if name.endswith("bias") else 1.0
    if len(shape) == 2:
        return "normal", (2 / (shape[0] + shape[1])) ** 0.5
    return "normal", math.prod(shape[1:]) ** -0.5
