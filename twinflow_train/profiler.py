"""A trace of some steps, for people who look for time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from twinflow_train.dist import World
from twinflow_train.errors import UserError

LONGEST = 100
"""Steps: a trace of more cannot be opened."""
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Profile:
    """Which steps are traced on rank 0, into FOLDER/profile/.

    steps: FIRST:END, as 10:13 for steps 10, 11 and 12; null is none.
    """

    steps: str | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            return
        if not re.fullmatch(r"\d{1,12}:\d{1,12}", self.steps):
            raise UserError(
                f"profile.steps is {self.steps}; it must be FIRST:END, such as 10:13 for the "
                "steps 10, 11 and 12"
            )
        if not 1 <= len(self.range) <= LONGEST:
            raise UserError(
                f"profile.steps is {self.steps}, which are {len(self.range)} steps; it must be 1 "
                f"to {LONGEST} of them, FIRST:END without END itself"
            )

    def check(self, steps: int) -> None:
        """Refuse to trace what is not in a run of so many steps: UserError."""
        if self.range.stop > steps:
            raise UserError(
                f"profile.steps is {self.steps}, and the run has {steps} steps: END may be at most "
                "that"
            )

    @property
    def range(self) -> range:
        """The steps."""
        return range(*map(int, self.steps.split(":"))) if self.steps else range(0)

    @contextmanager
    def tracer(self, folder: Path, world: World) -> Iterator[Tracer]:
        """Trace those steps of a run in `folder`; what was begun is written, however it ends."""
        tracer = Tracer(self.range if world.main else range(0), folder / "profile", world)
        try:
            yield tracer
        finally:
            tracer.stop()


class Tracer:
    """Traces some steps of this process."""

    def __init__(self, steps: range, folder: Path, world: World) -> None:
        self._steps, self._folder = steps, folder
        self._activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._running: profile | None = None

    def at(self, step: int) -> None:
        """Start or stop, before a step."""
        if step in self._steps and self._running is None:
            self._running = profile(activities=self._activities, record_shapes=True)
            self._running.start()
        elif step not in self._steps:
            self.stop()

    def stop(self) -> None:
        """Write the trace that was begun, if one was."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        path = self._folder / f"steps-{self._steps.start}-{self._steps.stop}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.warning("%s cannot be written: %s", path, error)
