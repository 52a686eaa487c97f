"""What the loop asks of an engine: a sharded student, its teacher, and their verbs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from twinflow_train.batch import Velocity
from twinflow_train.dist import World
from twinflow_train.engines.optim import Optim
from twinflow_train.models.base import Model, Weights


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

    kind: "model", "average" or a moment's name. name: the parameter's name in weight files.
    shape: of the whole tensor. offset: where the part begins in the whole, flattened.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    local: Tensor


class Sharded(Protocol):
    """A student in training and its teacher, spread over the ranks."""

    student: Velocity
    teacher: Velocity
    average: Velocity | None
    updates: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each of the student's parameters, by its name in weight files."""
        ...

    def networks(self) -> dict[str, Velocity]:
        """Name the networks to evaluate: "raw" and, where there is an average, "ema"."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the loss; collective."""
        ...

    def step(self, rate: float) -> Tensor:
        """Clip, update, average and clear; return the global gradient norm before clipping."""
        ...

    def spans(self) -> Iterator[Span]:
        """Yield every part of the state that this rank holds, the same names on every rank."""
        ...

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        ...

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of "model" or "average" on rank 0; collective."""
        ...


@dataclass(kw_only=True)
class Engine(ABC):
    """A way of sharding: the `engine` group of the configuration."""

    @abstractmethod
    def shard(
        self, model: Model, weights: Weights, *, optim: Optim, decay: float, world: World
    ) -> Sharded:
        """Build, shard and fill the student, and the teacher that follows it with `decay`.

        decay: 0: the teacher is the student itself; 1: it stays as it was; else it is averaged.
        """
