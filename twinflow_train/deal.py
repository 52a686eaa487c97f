"""Which rank sees which sample of an optimizer step, and when."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from twinflow_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Which sample of the global batch which rank sees in which micro-step.

    Samples are sorted by role; position p of rank w gets sample p * ranks + w. So at any
    micro-step the ranks hold the same roles, but for one position at each border between roles.
    """

    batch: int
    micro_batch: int
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        if self.batch % (self.micro_batch * self.ranks):
            raise UserError(
                f"batch = {self.batch} does not divide by micro_batch x ranks = "
                f"{self.micro_batch} x {self.ranks}"
            )

    @property
    def micro_steps(self) -> int:
        """How many micro-steps accumulate to an optimizer step."""
        return self.batch // (self.micro_batch * self.ranks)

    def everyone(self, micro: int) -> Int[Tensor, " rows"]:
        """Indices of the samples that all ranks together see in a micro-step."""
        size = self.micro_batch * self.ranks
        return torch.arange(micro * size, (micro + 1) * size)

    def mine(self, micro: int) -> Int[Tensor, " b"]:
        """Indices of the samples that this rank sees in a micro-step."""
        return self.everyone(micro)[self.rank :: self.ranks]

    def rows(self) -> list[list[int]]:
        """Indices of this rank's samples, a list a micro-step."""
        return [self.mine(micro).tolist() for micro in range(self.micro_steps)]
