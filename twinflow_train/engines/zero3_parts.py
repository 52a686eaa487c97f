"""What one rank holds of networks that ZeRO-3 has cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinflow_train.dist import World
from twinflow_train.engines.base import Span
from twinflow_train.engines.optim import MOMENTS
from twinflow_train.models.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's part of a parameter; the last parts are padded, so that all are equally long.

    name, shape: of the whole. offset: where the part begins in the whole, flattened.
    state: the part itself, padded. source: what the parameter is gathered from, in the type that
    the network computes in; the same tensor if the types agree. moments: the optimizer's, padded.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    state: Tensor
    source: Tensor
    moments: Mapping[str, Tensor]

    @staticmethod
    def of(
        name: str, parameter: Any, state: Tensor, moments: Mapping[str, Tensor], world: World
    ) -> Part:
        """Describe this rank's part of a cut parameter."""
        return Part(
            name=name,
            shape=tuple(parameter.ds_shape),
            offset=world.rank * parameter.partition_numel(),
            state=state,
            source=parameter.ds_tensor,
            moments=moments,
        )

    def local(self, padded: Tensor) -> Tensor:
        """Leave out the padding."""
        return padded[: max(0, math.prod(self.shape) - self.offset)]

    def span(self, kind: str, padded: Tensor) -> Span:
        """Describe the state or a moment."""
        return Span(
            kind=kind,
            name=self.name,
            shape=self.shape,
            offset=min(self.offset, math.prod(self.shape)),
            local=self.local(padded),
        )

    def fill(self, weights: Weights) -> None:
        """Read this rank's rows of the weights, the first and the last of them perhaps in part."""
        self.state.zero_()
        local, width = self.local(self.state), math.prod(self.shape[1:])
        if local.numel():
            first, last = self.offset // width, -(-(self.offset + len(local)) // width)
            rows = weights.read(self.name, torch.Size(self.shape), first, last).reshape(-1)
            begin = self.offset - first * width
            local.copy_(rows[begin : begin + len(local)])


def masters(zero: Any) -> dict[Tensor, tuple[Tensor, dict[str, Tensor]]]:
    """Find each trained parameter's float32 part and its moments in ZeRO-3's flat ones."""
    found = {}
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.partition_numel() for parameter in group]
        states = flat.detach().split(sizes)
        moments = [zero.optimizer.state[flat][kind].split(sizes) for kind in MOMENTS]
        for parameter, state, *rest in zip(group, states, *moments, strict=True):
            found[parameter] = state, dict(zip(MOMENTS, rest, strict=True))
    return found


def held(source: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Give a shard itself if it has the type, else room for one that has."""
    return source if source.dtype == dtype else torch.zeros_like(source, dtype=dtype, device=device)
