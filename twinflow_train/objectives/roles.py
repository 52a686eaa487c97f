"""Who does what in an optimizer step: exact shares of its batch, dealt evenly to the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(kw_only=True)
class Shares:
    """Relative shares of the roles in the global batch, in the order in which they are dealt.

    generator: (t, r) = (1, 0), the one-step generator; it also carries the rectification.
    local: r at or just below t, nearly plain flow matching.
    jump: r anywhere below t.
    direct: r = 0, used by first-order LoRA training in place of jump.
    fake: negative time; its data is the model's own one-step sample.
    """

    generator: float = 1.0
    local: float = 1.0
    jump: float = 1.0
    direct: float = 0.0
    fake: float = 1.0

    def __post_init__(self) -> None:
        for role, share in self.items():
            if not 0 <= share < math.inf:
                raise ValueError(f"objective.shares.{role} must be 0 or more, got {share}")
        if not any(share for _, share in self.items()):
            raise ValueError("objective.shares are all 0: give at least one role a share")

    def items(self) -> list[tuple[str, float]]:
        """List (role, share) in dealing order."""
        return [(f.name, self.__dict__[f.name]) for f in fields(Shares)]

    def counts(self, batch: int) -> dict[str, int]:
        """Split `batch` samples exactly, by largest remainder; ties go to the earlier role.

        Raises:
            ValueError: a role with a positive share would get no sample.
        """
        total = sum(share for _, share in self.items())
        exact = {role: batch * share / total for role, share in self.items()}
        counts = {role: math.floor(value) for role, value in exact.items()}
        by_remainder = sorted(exact, key=lambda role: counts[role] - exact[role])
        for role in by_remainder[: batch - sum(counts.values())]:
            counts[role] += 1
        for role, share in self.items():
            if share and not counts[role]:
                raise ValueError(
                    f"objective.shares.{role} = {share} of {total} gets no sample of "
                    f"batch = {batch}: raise batch or set the share to 0"
                )
        return counts


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
            raise ValueError(
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
        return self.everyone(micro)[self.rank :: self.ranks].contiguous()

    def rows(self) -> list[list[int]]:
        """Indices of this rank's samples, a list a micro-step."""
        return [self.mine(micro).tolist() for micro in range(self.micro_steps)]
