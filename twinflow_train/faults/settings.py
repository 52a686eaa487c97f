"""What a run puts up with before it acts."""

from __future__ import annotations

from dataclasses import dataclass

from twinflow_train.errors import check

SHORTEST_SECONDS, LONGEST_SECONDS = 60.0, 30 * 86400.0
"""Of a collective's patience: ranks may start and load at different times."""


@dataclass(kw_only=True)
class Faults:
    """What a run puts up with (docs/faults.md).

    budget: steps in a row that may be skipped for their numbers; at one more the run goes back to
        its last checkpoint before them, and passes their data over.
    rollbacks: how often a run may go back; then it stops with a report.
    report_above, skip_above: report or skip a step whose loss or gradient norm is more than so many
        median deviations above the median of the last ones; 0 is never.
    hang_seconds: what a step may take before the process ends, with a code that says "hung"; less
        once there is a usual time (see `Watchdog`). Also what any collective may take before it
        fails, at least a minute, and six times that while a checkpoint is written. 0 is without
        end.
    slow_above: name a rank that takes more than so many times the ranks' median; 0 is never.
    """

    budget: int = 10
    rollbacks: int = 1
    report_above: float = 20.0
    skip_above: float = 0.0
    hang_seconds: float = 600.0
    slow_above: float = 1.5

    @property
    def patience_seconds(self) -> float:
        """Seconds that any one collective may take, also where no step is being taken."""
        return max(self.hang_seconds, SHORTEST_SECONDS) if self.hang_seconds else LONGEST_SECONDS

    @property
    def saving_seconds(self) -> float:
        """The same where a checkpoint is written: disks differ more than GPUs."""
        return max(self.patience_seconds, 6 * self.hang_seconds)

    def __post_init__(self) -> None:
        rules = [
            (key, vars(self)[key] >= 0, "0 or more")
            for key in ("budget", "rollbacks", "report_above", "skip_above", "hang_seconds")
        ]
        above = self.slow_above == 0 or self.slow_above > 1
        check("faults", self, [*rules, ("slow_above", above, "above 1, or 0")])
