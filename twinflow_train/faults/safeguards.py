"""All that watches over a run's steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twinflow_train.dist import World
from twinflow_train.faults.guard import Guard
from twinflow_train.faults.pace import Pace
from twinflow_train.faults.record import Record
from twinflow_train.faults.settings import Faults
from twinflow_train.faults.watchdog import Watchdog


@dataclass(kw_only=True)
class Safeguards:
    """What watches over a run's steps: over their numbers, their end, and their speed."""

    guard: Guard
    watchdog: Watchdog
    pace: Pace


@contextmanager
def safeguards(faults: Faults, record: Record, folder: Path, world: World) -> Iterator[Safeguards]:
    """Watch over a run. Collective.

    record: of the run's progress. folder: the run's.
    """
    with Watchdog(faults.hang_seconds, folder=folder / "stacks", world=world) as watchdog:
        yield Safeguards(
            guard=Guard(faults=faults, record=record, folder=folder, world=world),
            watchdog=watchdog,
            pace=Pace(world, slow_above=faults.slow_above),
        )
