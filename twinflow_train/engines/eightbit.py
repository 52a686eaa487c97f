"""Numbers of 8 bits in blocks that share a scale, as torchao's optimizers hold their moments.

Between two powers of ten of a block's largest number lie the more levels the larger they are
(dynamic tree quantization: Dettmers et al. 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DECADES = 7
SMALLEST = 1e-12
"""The least scale of a block, so that zeros can be divided by it."""


class Table(NamedTuple):
    """The 256 levels in order, and where one ends and the next begins."""

    levels: Tensor
    edges: Tensor


def table(device: torch.device, *, signed: bool) -> Table:
    """Make the levels between -1 and 1, or between 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        ends = torch.linspace(0.1, 1, (1 << decade) * (1 if signed else 2) + 1)
        middle = 10.0 ** (decade - DECADES + 1) * ((ends[:-1] + ends[1:]) / 2)
        values += [middle, -middle] if signed else [middle]
    levels = torch.cat(values).sort().values
    edges = levels[:-1] + (levels[1:] - levels[:-1]) * 0.5
    return Table(levels.to(device), edges.to(device))


def packed(values: Tensor, among: Table) -> tuple[Tensor, Tensor]:
    """Give codes [n, block] and scales [n] of float32 values [n, block]."""
    scales = values.abs().amax(1).clamp(min=SMALLEST)
    codes = torch.bucketize(values / scales[:, None], among.edges, right=True, out_int32=True)
    return codes.to(torch.uint8), scales


def unpacked(codes: Tensor, scales: Tensor, among: Table) -> Tensor:
    """Give the float32 values that codes and scales stand for."""
    return among.levels[codes.int()] * scales[:, None]
