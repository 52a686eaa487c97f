"""Optimizers, their learning-rate schedule and clipping, as configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(kw_only=True)
class Optim:
    """What every optimizer shares.

    lr: highest learning rate. betas: decay of the first and second moments.
    clip: largest global norm of the gradient; 0 does not clip.
    warmup: steps of linear warm-up. constant: share of the run after which the rate decays along
    half a cosine to lr_end x lr; 1 keeps it constant.
    """

    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 0
    constant: float = 1.0
    lr_end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), got {list(self.betas)}")
        for key in ("eps", "weight_decay", "clip", "warmup", "lr_end"):
            value = self.__dict__[key]
            if not 0 <= value < math.inf:
                raise ValueError(f"optim.{key} must be 0 or more, got {value}")
        if not 0 <= self.constant <= 1:
            raise ValueError(f"optim.constant must be in [0, 1], got {self.constant}")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` (from 0) in a run of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        start = max(self.warmup, self.constant * steps)
        if step < start:
            return self.lr
        along = (step - start) / max(1.0, steps - start)
        return self.lr * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * along)) / 2)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer."""
        raise NotImplementedError


@dataclass(kw_only=True)
class AdamW(Optim):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make a fused AdamW."""
        return torch.optim.AdamW(
            list(parameters),
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the state that Adam-like optimizers keep beside each parameter."""


def begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its zero moments now: memory and checkpoints are whole from step 0."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in MOMENTS},
            }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell a restored optimizer how many updates it has made."""
    for state in optimizer.state.values():
        step: Tensor = state["step"]
        step.fill_(updates)
