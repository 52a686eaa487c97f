"""Rounding to bfloat16 up or down at random, by a hash of where a number stands.

bfloat16 has 8 binary digits: rounded to the nearest, every step below 1/512 of a weight is lost,
at small learning rates nearly all of them. Rounded at random, with the mean kept, they add up.
Hashes need no generator: they are the same on every device, and fuse into the update's kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SECOND = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32)
"""Multipliers of MurmurHash3's last step (Appleby, public domain), as signed numbers."""


def scramble(x: Tensor) -> Tensor:
    """Send int32 numbers, one to one, to others that look random: MurmurHash3's last step."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 13) & 0x7FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def keys(count: Tensor, tensors: int) -> Tensor:
    """Make the keys of so many tensors at the update `count`, two int32 numbers each."""
    numbers = torch.arange(2 * tensors, dtype=torch.int32, device=count.device)
    return scramble(scramble(numbers) ^ scramble(count.to(torch.int32))).view(tensors, 2)


def rounded(values: Tensor, key: Tensor, start: int) -> Tensor:
    """Round float32 values to bfloat16, up or down at random with the mean kept.

    What bfloat16 holds exactly stays. start: how many numbers of the tensor come before these.
    """
    index = torch.arange(start, start + values.numel(), dtype=torch.int32, device=values.device)
    noise = scramble(scramble(index ^ key[0]) + key[1]) & 0xFFFF
    bits = values.contiguous().view(torch.int32) + noise.view(values.shape)
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
