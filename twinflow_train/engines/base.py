"""What the loop asks of an engine: a sharded student, its teacher, and their verbs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from twinflow_train.batch import Velocity
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.optim import Optim
from twinflow_train.errors import UserError, check
from twinflow_train.faults import Faults
from twinflow_train.models.adapter import BASE, Adapter
from twinflow_train.models.base import Model
from twinflow_train.models.weights import Weights
from twinflow_train.objectives.twinflow import TwinFlow


class Precision(Enum):
    """Type in which networks compute; masters, times, residuals and moments are float32 anyway."""

    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The torch type."""
        return torch.float32 if self is Precision.fp32 else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Span:
    """A contiguous part of one named state tensor that this rank holds, as a live flat view.

    kind: "model", "average", "slow", "frozen" or a moment's (see `Saved`). name: the parameter's
    name in weight files. shape: of the whole tensor. offset: where the part begins, flattened.
    mine: whether this rank is the one, among those that hold the same part, that saves it.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    local: Tensor
    mine: bool = True


NO_LIMITS = (math.inf, math.inf)
"""Of a loss and a gradient norm, with which every step is taken that has finite ones."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What became of an optimizer step; both may still be on their way, so reading them waits.

    norm: the global gradient norm before clipping. updated: whether there was an update.
    """

    norm: Tensor
    updated: Tensor


class Sharded(Protocol):
    """A student in training and its teacher, spread over the ranks.

    averages: the averaged networks by their kind, "average" (the teacher's) and "slow".
    base: the network that training began with, where it is still at hand.
    frozen: how many numbers are held beside the state, and never change.
    """

    student: Velocity
    teacher: Velocity
    averages: Mapping[str, Velocity]
    base: Velocity | None
    frozen: int

    @property
    def updates(self) -> int:
        """Optimizer steps taken; reading it waits for the device."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each of the student's own parameters, by its name in weight files."""
        ...

    def networks(self) -> dict[str, Velocity]:
        """Name the networks to evaluate: "raw" and, where there are averages, "ema" and "slow"."""
        ...

    def begin(self, rate: float) -> None:
        """Say that the next backward passes are those of a step of this learning rate.

        What they give without it is for `discard`: engines that update inside of the backward pass
        take the rate from here.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the loss; collective.

        last: whether this is the optimizer step's last micro-step.
        """
        ...

    def step(
        self,
        rate: float,
        *,
        number: int = 0,
        loss: Tensor | None = None,
        limits: tuple[float, float] = NO_LIMITS,
    ) -> Taken:
        """Clip, update, average and clear.

        Where the step's loss, over all ranks, or the gradient's norm is not finite or above its
        limit, nothing is updated, nor counted in `updates`; alike on every rank. number: of the
        step, for the draws of averages that are rounded at random. `Single`, which has updated by
        then, forbids less.
        """
        ...

    def discard(self) -> Tensor:
        """Forget the accumulated gradient without an update; return its global norm."""
        ...

    def spans(self) -> Iterator[Span]:
        """Yield every part of the state that this rank holds, the same names on every rank."""
        ...

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        ...

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of a kind of weights on rank 0; collective."""
        ...


class Networks:
    """A run's networks by what they are for (see `Sharded`), out of those that it has by kind."""

    def __init__(self, found: Mapping[str, Velocity], decays: Mapping[str, float]) -> None:
        self.student: Velocity = found["model"]
        self.teacher: Velocity = found.get("frozen") or found.get("average") or self.student
        self.averages: Mapping[str, Velocity] = {
            kind: found[kind] for kind, decay in decays.items() if decay < 1
        }
        self.base: Velocity | None = found.get(BASE)

    def begin(self, rate: float) -> None:
        """Do nothing: the rate is asked for when the step is taken."""

    def networks(self) -> dict[str, Velocity]:
        """Name the networks to evaluate: "raw" and, where there are averages, "ema" and "slow"."""
        shown = {"average": "ema", "slow": "slow"}
        averages = {shown[kind]: network for kind, network in self.averages.items()}
        return {"raw": self.student} | averages


def allowed(norm: Tensor, loss: Tensor | None, limits: tuple[float, float]) -> Tensor:
    """Tell, on the norm's device, whether a step is to be taken (see `Sharded.step`)."""
    fine = norm.isfinite() & (norm <= limits[1])
    if loss is not None:
        # Gradients in host memory have their norm there, and are then waited for anyway.
        fine = fine & (loss.isfinite() & (loss <= limits[0])).to(fine.device)
    return fine


class Parts(Protocol):
    """What an engine looks at of a run before it builds anything."""

    adapter: Adapter
    objective: TwinFlow
    optim: Optim
    average: Averages
    faults: Faults
    batch: int
    micro_batch: int


@dataclass(kw_only=True)
class Engine(ABC):
    """A way of sharding: the `engine` group of the configuration.

    precision: type in which the networks compute.
    recompute: recompute every n-th block's activations in the backward pass; 0 keeps all.
    keep_products: keep the outputs of matrix products and attention in recomputed blocks, and
        recompute only what is cheap.
    """

    precision: Precision = Precision.bf16
    recompute: int = 1
    keep_products: bool = False

    def __post_init__(self) -> None:
        check("engine", self, [("recompute", self.recompute >= 0, "0 or more")])
        if self.keep_products and not self.recompute:
            raise UserError("engine.keep_products needs recomputed blocks: engine.recompute >= 1")

    def check(self, run: Parts, *, ranks: int) -> None:
        """Refuse, before anything is built, what cannot go with it: UserError."""
        return

    @abstractmethod
    def shard(
        self,
        model: Model,
        weights: Weights,
        *,
        adapter: Adapter,
        optim: Optim,
        decay: float,
        average: Averages,
        world: World,
    ) -> Sharded:
        """Build, shard and fill the student, and the networks that follow it.

        weights: of all that the adapter makes of the model (see `Adapter.weights`). decay: of the
        teacher; 0: it is the student itself; 1: it stays as it was; else it is averaged. average:
        how averages are held, and whether there is a second one.
        """

    def held(self, kind: str, average: Averages) -> torch.dtype:
        """Return the type in which parameters of a kind are held.

        What is never updated needs no more digits than it is computed with.
        """
        if kind in ("model", BASE):
            return torch.float32 if kind == "model" else self.precision.dtype
        return torch.bfloat16 if average.bf16 else torch.float32
