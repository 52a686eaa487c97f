"""Who does what in an optimizer step: exact shares of its batch, dealt evenly to the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction

from twinflow_train.errors import UserError, check


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
        rules = [(role, 0 <= share < math.inf, "0 or more") for role, share in self.items()]
        check("objective.shares", self, rules)
        if not any(share for _, share in self.items()):
            raise UserError("objective.shares are all 0: give at least one role a share")

    def items(self) -> list[tuple[str, float]]:
        """List (role, share) in dealing order."""
        return [(f.name, self.__dict__[f.name]) for f in fields(Shares)]

    def counts(self, batch: int) -> dict[str, int]:
        """Split `batch` samples exactly, by largest remainder; ties go to the earlier role.

        Raises:
            UserError: a role with a positive share would get no sample.
        """
        # Decimal fractions as they were written, so that equal remainders are equal.
        shares = {role: Fraction(str(share)) for role, share in self.items()}
        total = sum(shares.values())
        exact = {role: batch * share / total for role, share in shares.items()}
        counts = {role: math.floor(value) for role, value in exact.items()}
        by_remainder = sorted(exact, key=lambda role: counts[role] - exact[role])
        for role in by_remainder[: batch - sum(counts.values())]:
            counts[role] += 1
        for role, share in self.items():
            if share and not counts[role]:
                raise UserError(
                    f"objective.shares.{role} = {share} of {float(total)} gets no sample of "
                    f"batch = {batch}: raise batch or set the share to 0"
                )
        return counts
