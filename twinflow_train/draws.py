"""What is random in a micro-batch, drawn once on the CPU beside the data loading."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twinflow_train.batch import Times


@dataclass(kw_only=True)
class Table:
    """Roles, times and needed passes of every sample of one optimizer step's global batch.

    counts: samples of each role, in order. needs: which samples need which pass without gradient.
    """

    counts: dict[str, int]
    t: Times
    r: Times
    needs: dict[str, Bool[Tensor, " batch"]]

    def slices(self, index: Int[Tensor, " b"]) -> dict[str, slice]:
        """Return the positions of each role among some sorted sample indices."""
        ends = torch.tensor([0, *self.counts.values()]).cumsum(0)
        bounds = torch.searchsorted(index.contiguous(), ends).tolist()
        return {role: slice(*bounds[k : k + 2]) for k, role in enumerate(self.counts)}

    def calls(self, index: Int[Tensor, " b"]) -> frozenset[str]:
        """Name the passes that some of these samples need."""
        return frozenset(name for name, need in self.needs.items() if bool(need[index].any()))


@dataclass(kw_only=True)
class Draws:
    """Everything random in one micro-batch, and the rows that each pass needs.

    counts: rows of each role in the global batch; roles: this micro-batch's rows of each role.
    t, r: times before the fake rows' sign. noise: z of x_t. noise_fake: z' of generated data, a row
    for each of `generate`. noise_rectify, tau: z'' and the time of rectification, a row for each
    of `rectify`. grid: where the recursion's inner jumps end, as fractions of the way.
    unconditional: rows whose condition is replaced by the null prompt.
    generate, guide, recurse, rectify: rows that need the pass; calls: passes that any rank needs.
    """

    counts: dict[str, int]
    roles: dict[str, slice]
    t: Times
    r: Times
    noise: Float[Tensor, "b *chw"]
    noise_fake: Float[Tensor, "f *chw"]
    noise_rectify: Float[Tensor, "g *chw"]
    tau: Float[Tensor, " g"]
    grid: Float[Tensor, "b inner"]
    unconditional: Bool[Tensor, " b"]
    generate: Int[Tensor, " f"]
    guide: Int[Tensor, " n"]
    recurse: Int[Tensor, " m"]
    rectify: Int[Tensor, " g"]
    calls: frozenset[str]

    def pinned(self) -> Draws:
        """Move every tensor to memory from which a GPU takes it by itself."""
        pinned = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(pinned, name, value.pin_memory())
        return pinned

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Draws:
        """Move every tensor to `device`, real numbers to `dtype` if given."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                kind = dtype if value.is_floating_point() else None
                setattr(moved, name, value.to(device, kind, non_blocking=True))
        return moved
