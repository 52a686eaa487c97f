"""Optimizers, their learning-rate schedule and clipping, as configuration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twinflow_train.errors import UserError, check

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the state that Adam-like optimizers keep beside each parameter."""

BLOCK = 256
"""Numbers of an 8-bit moment that share a scale."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds of a moment, on this rank.

    kind: its name there. local: the numbers, as a live flat view. block: how many numbers of the
    parameter share one of them.
    """

    kind: str
    local: Tensor
    block: int = 1


@dataclass(kw_only=True)
class Optim(ABC):
    """What every optimizer shares.

    skips: whether the built optimizer heeds `found_inf`, and so needs nobody to look before a step
    whether it is to be taken.
    lr: highest learning rate. betas: decay of the first and second moments.
    clip: largest global norm of the gradient; 0 does not clip.
    warmup: steps of linear warm-up. constant: share of the run after which the rate decays along
    half a cosine to lr_end x lr; 1 keeps it constant.
    """

    skips: ClassVar[bool] = False

    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 0
    constant: float = 1.0
    lr_end: float = 0.0

    def __post_init__(self) -> None:
        check("optim", self, self._rules())

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        yield "lr", 0 < self.lr < math.inf, "positive"
        yield "betas", betas, "two numbers in [0, 1)"
        for key in ("eps", "weight_decay", "clip", "warmup", "lr_end"):
            yield key, 0 <= vars(self)[key] < math.inf, "0 or more"
        yield "constant", 0 <= self.constant <= 1, "in [0, 1]"

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` (from 0) in a run of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        start = max(self.warmup, self.constant * steps)
        if step < start:
            return self.lr
        along = (step - start) / max(1.0, steps - start)
        return self.lr * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * along)) / 2)

    @abstractmethod
    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer, every parameter with its zero moments.

        Memory and checkpoints are whole from the first step on, and nothing is made in between.
        """

    def saved(self, kind: str, moment: DTensor) -> Iterator[Saved]:
        """Yield what has to be saved of a parameter's moment; the same kinds on every rank."""
        yield Saved(kind=kind, local=moment.to_local().view(-1))


@dataclass(kw_only=True)
class AdamW(Optim):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    skips: ClassVar[bool] = True

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Make a fused AdamW with zero moments."""
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
        for p in parameters:  # a fused step reads its count on the device
            optimizer.state[p] = _zeros(p, step=torch.zeros((), device=p.device))
        return optimizer


@dataclass(kw_only=True)
class RAdam(Optim):
    """Rectified Adam (Liu et al. 2020), with decoupled weight decay."""

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Make a RAdam over lists of tensors with zero moments."""
        optimizer = torch.optim.RAdam(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
            foreach=True,
        )
        for p in parameters:
            optimizer.state[p] = _zeros(p, step=torch.zeros(()))
        return optimizer


@dataclass(kw_only=True)
class AdamW8bit(Optim):
    """AdamW with moments of 8 bits in blocks of 256 (Dettmers et al. 2022), by torchao.

    A block never crosses a row, so that the blocks are the same however the rows are spread over
    ranks. Moments of vectors, and of tensors whose rows are not whole blocks, stay float32.
    """

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Make torchao's optimizer with zero moments; UserError if torchao is not installed."""
        try:
            from torchao.optim import AdamW8bit as Torchao
            from torchao.optim.subclass_8bit import OptimState8bit
        except ImportError as error:
            raise UserError(
                "optim=adamw8bit needs torchao: pip install 'twinflow-train[lowbit]'"
            ) from error
        optimizer: torch.optim.Optimizer = Torchao(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            block_size=BLOCK,
        )
        for p in parameters:
            # Left to torchao, it would depend on the ranks which moments have 8 bits.
            state = _zeros(p, step=torch.zeros(()))
            for kind in MOMENTS:
                local = _sharded(state[kind]).to_local()
                if in_blocks(p.shape) and local.numel():
                    signed = kind == "exp_avg"
                    zeros = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device)
                    state[kind] = _like(_sharded(state[kind]), zeros)
            optimizer.state[p] = state
        return optimizer

    def saved(self, kind: str, moment: DTensor) -> Iterator[Saved]:
        """Yield codes and scales of what is quantized: from them it comes back exactly."""
        if not in_blocks(moment.shape):
            yield from super().saved(kind, moment)
            return
        local: Any = moment.to_local()
        codes, scales = (local.codes, local.scale) if local.numel() else (local.byte(), local)
        yield Saved(kind=f"{kind}_codes", local=codes.view(-1))
        yield Saved(kind=f"{kind}_scales", local=scales.view(-1), block=BLOCK)


def in_blocks(shape: Sequence[int]) -> bool:
    """Tell whether the rows of a tensor of this shape are whole blocks."""
    return math.prod(shape[1:]) % BLOCK == 0


def _zeros(parameter: nn.Parameter, *, step: Tensor) -> dict[str, Tensor]:
    return {"step": step, **{name: torch.zeros_like(parameter) for name in MOMENTS}}


def _like(shard: DTensor, local: Tensor) -> Tensor:
    """Give a local tensor the layout of a shard, and its device, which offloading changes."""
    whole = DTensor.from_local(
        local,
        shard.device_mesh,
        shard.placements,
        run_check=False,
        shape=shard.shape,
        stride=shard.stride(),
    )
    return whole.to(shard.device)


def _sharded(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor), "only FSDP2, where all are DTensors, takes 8-bit moments"
    return tensor


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell a restored optimizer how many updates it has made."""
    for state in optimizer.state.values():
        step: Tensor = state["step"]
        step.fill_(updates)
