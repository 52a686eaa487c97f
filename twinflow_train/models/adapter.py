"""What of a model is trained, and which networks that makes: all of it here, less in `lora`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from twinflow_train.batch import Velocity
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.weights import Weights

BASE = "base"
"""Kind of the parameters that several networks share, and that nothing ever changes."""

Tensors = Iterable[tuple[str, Tensor]]
"""Names, as weight files have them, and whole tensors."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One module on meta that an engine shards as a whole, and the networks that it is.

    networks: by kind: "model" is the student, "average", "slow" and "frozen" follow or watch it.
    owners: for each parameter of `net` the kind of network that it belongs to, or BASE, and its
    name there, as in weight files.
    """

    net: VelocityNet
    networks: Mapping[str, Velocity]
    owners: Mapping[str, tuple[str, str]]

    @property
    def trained(self) -> bool:
        """Whether the student is in it."""
        return "model" in self.networks

    def tensors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield kind, name and parameter as the module has it now: sharding replaces them."""
        for own, parameter in self.net.named_parameters():
            yield *self.owners[own], parameter


@dataclass(kw_only=True)
class Adapter(ABC):
    """What of a model is trained: the `adapter` group of the configuration.

    partial: whether a base stays as it was, which checkpoints and exports leave out.
    """

    partial: ClassVar[bool] = False

    @abstractmethod
    def check(self, model: Model) -> None:
        """Refuse a model that it does not fit: UserError."""

    @abstractmethod
    def assemble(self, model: Model, beside: Sequence[str]) -> list[Assembly]:
        """Build the student, and the networks beside it of these kinds, on meta."""

    @abstractmethod
    def weights(self, base: Weights, *, seed: int) -> Weights:
        """Give what all of it starts from, given what the model starts from."""

    @abstractmethod
    def save(self, folder: Path, model: Model, tensors: Tensors, *, dtype: torch.dtype) -> None:
        """Write one network's trained weights into an export's folder, for the stock classes."""

    @abstractmethod
    def contents(self, model: Model) -> str:
        """Begin a sentence on what `save` writes, up to its verb "hold"."""


@dataclass(kw_only=True)
class NoAdapter(Adapter):
    """Everything is trained; each network beside the student is a module of its own."""

    def check(self, model: Model) -> None:
        """Refuse nothing."""

    def assemble(self, model: Model, beside: Sequence[str]) -> list[Assembly]:
        """Build one module for each network."""
        assemblies = [_alone("model", model.build())]
        for kind in beside:
            net = model.build().requires_grad_(False)
            if kind == "frozen":
                net.keep_own_clock()
            assemblies.append(_alone(kind, net))
        return assemblies

    def weights(self, base: Weights, *, seed: int) -> Weights:
        """Give the model's own."""
        return base

    def save(self, folder: Path, model: Model, tensors: Tensors, *, dtype: torch.dtype) -> None:
        """Write all weights as the model reads them."""
        model.save(folder, ((name, tensor.to(dtype)) for name, tensor in tensors))

    def contents(self, model: Model) -> str:
        """Begin a sentence on what `save` writes, up to its verb "hold"."""
        return "`transformer/` holds"


def _alone(kind: str, net: VelocityNet) -> Assembly:
    names = net.stored_names()
    return Assembly(
        net=net,
        networks={kind: net},
        owners={own: (kind, name) for own, name in names.items()},
    )
