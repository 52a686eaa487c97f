"""What a run remembers of its faults: the same on all ranks, and part of every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

WINDOW = 128
"""Steps whose losses and norms say what is usual."""
ENOUGH = 32
"""Steps that it takes to know."""
SMALLEST = 0.01
"""Of the median: no deviation counts as smaller, or a quiet run would report every ripple."""


@dataclass(kw_only=True)
class Record:
    """What a run remembers of its faults.

    passed: steps' worth of data that rollbacks have passed over. skipped: steps without an update;
    in_row: of them, those since the last update. rollbacks: how often the run went back.
    losses, norms: of the last steps that had an update; newest: the last of those steps.
    """

    passed: int = 0
    skipped: int = 0
    in_row: int = 0
    rollbacks: int = 0
    newest: int = -1
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @staticmethod
    def of(stored: Any) -> Record:
        """Read what `vars` of one gave; what is missing, as in older checkpoints, has its default.

        Raises:
            TypeError, ValueError: it was not made by `vars` of one.
        """
        known = {each.name: stored[each.name] for each in fields(Record) if each.name in stored}
        series = ("losses", "norms")
        read: dict[str, Any] = {
            key: [*map(float, value)] if key in series else int(value)
            for key, value in known.items()
        }
        return Record(**read)

    def limits(self, times: float, *, without: int | None = None) -> tuple[float, float]:
        """Return the greatest loss and norm within so many median deviations of the medians.

        without: a step that is not looked at, though it may be known already.
        """
        series = [self.losses, self.norms]
        if without is not None and self.newest == without:
            series = [values[:-1] for values in series]
        losses, norms = (_limit(values[-WINDOW:], times) for values in series)
        return losses, norms

    def updated(self, step: int, loss: float, norm: float) -> None:
        """Count a step that had an update."""
        self.in_row, self.newest = 0, step
        self.losses = [*self.losses, loss][-WINDOW - 1 :]
        self.norms = [*self.norms, norm][-WINDOW - 1 :]

    def was_skipped(self) -> None:
        """Count a step that had none."""
        self.skipped += 1
        self.in_row += 1

    def went_back(self, before: Record, *, passed: int) -> None:
        """Be the record of a checkpoint's state again, knowing what happened after."""
        self.passed, self.in_row = passed, 0
        self.skipped, self.rollbacks = before.skipped, before.rollbacks + 1


def _limit(values: Sequence[float], times: float) -> float:
    """Return median + times x median deviation; none while too little is known or not wanted."""
    if not times or len(values) < ENOUGH:
        return math.inf
    middle = median(values)
    deviation = median(abs(value - middle) for value in values)
    return middle + times * max(deviation, SMALLEST * abs(middle))
