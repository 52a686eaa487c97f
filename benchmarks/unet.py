"""A small class-conditional U-Net with two times: the same network for every method compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinflow_train.batch import Condition

NULL = 10  # the class that stands for no class
WIDTH = 128  # of the embedding that every block gets
WAVES = 32
SLOWEST, FASTEST = 0.5, 64.0  # radians per unit of time


class Block(nn.Module):
    """Two convolutions with the embedding added between them, around a skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.told = nn.Linear(WIDTH, outputs)
        self.second = nn.Sequential(
            nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return x changed, with as many channels as the block puts out."""
        h = self.first(x) + self.told(embedding)[:, :, None, None]
        out: Tensor = self.skip(x) + self.second(h)
        return out


class UNet(nn.Module):
    """F(x_t, t, r, cond) for (b, 1, 16, 16) images; a condition's one number is its class.

    The second time enters as (t - r) E2(r), so it vanishes at r = t.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.then = (
            nn.Sequential(nn.Linear(2 * WAVES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )
        self.classes = nn.Embedding(NULL + 1, WIDTH)
        self.enter = nn.Conv2d(1, 32, 3, padding=1)
        self.fine = Block(32, 32)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.middle = Block(64, 64)
        self.further = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList([Block(64, 64), Block(64, 64)])
        self.up = Block(128, 64)
        self.finest = Block(96, 32)
        self.leave = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 1, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        """Predict the average velocity from time t to time r."""
        told = self.classes(cond.tokens[:, 0, 0].long()) + self.now(waves(t))
        told = functional.silu(told + (t - r)[:, None] * self.then(waves(r)))
        fine = self.fine(self.enter(x_t), told)
        middle = self.middle(self.down(fine), told)
        h = self.further(middle)
        for block in self.coarse:
            h = block(h, told)
        h = self.up(torch.cat([functional.interpolate(h, scale_factor=2), middle], 1), told)
        h = self.finest(torch.cat([functional.interpolate(h, scale_factor=2), fine], 1), told)
        found: Tensor = self.leave(h)
        return found


def waves(t: Tensor) -> Tensor:
    """Turn times (b,) of either sign into sines and cosines (b, 2 WAVES)."""
    speeds = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), WAVES, dtype=t.dtype)
    angles = t[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], 1)


def unet(seed: int) -> UNet:
    """Build the network; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet()
    for weight in net.parameters():
        if weight.ndim == 4:  # this layout is a third faster on one thread
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net
