"""Dealing numbered rows to processes: all make the same calls, and results do not change."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from twinflow_train.dist import World


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Rows 0 to count - 1 dealt like cards; ranks without a last one get a filler.

    Networks may be sharded, so a rank that made one call less would leave the others waiting.
    """

    count: int
    world: World

    @property
    def mine(self) -> list[int]:
        """Return this rank's row numbers, equally many on every rank; fillers repeat the first."""
        first, size = self.world.rank, self.world.size
        each = -(-self.count // size)
        numbers = [first + size * k for k in range(each)]
        return [number if number < self.count else 0 for number in numbers]

    def chunks(self, rows: int) -> list[list[int]]:
        """Cut this rank's row numbers into chunks of at most `rows`."""
        mine = self.mine
        return [mine[start : start + rows] for start in range(0, len(mine), rows)]

    def collect(self, rows: Shaped[Tensor, "mine *rest"]) -> Shaped[Tensor, "count *rest"]:
        """Bring what the ranks made into the order of row numbers, without fillers; collective."""
        return self.world.gather(rows).transpose(0, 1).flatten(0, 1)[: self.count]
