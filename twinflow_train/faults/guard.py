"""Which steps are taken, as all ranks agree without asking, and what is said of the others."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from twinflow_train.batch import Batch
from twinflow_train.dist import World
from twinflow_train.errors import UserError, listed
from twinflow_train.faults.record import Record
from twinflow_train.faults.settings import Faults

NAMED = 3
"""Samples that each rank names when none stands out as not finite: those of the greatest loss."""
FILE = "faults.jsonl"
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Guard:
    """Decides which steps are taken, from numbers that are the same on every rank.

    folder: of the run, for `faults.jsonl`. judged: the last step of which the numbers are known,
    and the position of its data.
    """

    faults: Faults
    record: Record
    folder: Path
    world: World
    judged: tuple[int, int] = (-1, -1)

    def limits(self, step: int) -> tuple[float, float]:
        """Return the greatest loss and gradient norm with which a step is taken.

        Of the steps up to the last but one: the device may still be computing the last one, and
        where a checkpoint was made in between it must not matter that this one is known.
        """
        return self.record.limits(self.faults.skip_above, without=step - 1)

    def judge(
        self,
        step: int,
        position: int,
        *,
        loss: float,
        norm: float,
        updated: bool,
        batches: Sequence[Batch],
        rows: Sequence[Tensor],
    ) -> None:
        """Take note of a step; tell which samples were in it if it was no usual one. Collective.

        position: of its data. loss, norm: over all ranks. updated: whether it had an update.
        rows: each micro-batch's losses by row; they are read only if there is something to tell.
        """
        what = self._unusual(loss, norm)
        self.judged = step, position
        if updated:
            self.record.updated(step, loss, norm)
        else:
            self.record.was_skipped()
        if not what and updated:
            return
        what = what or "the loss or the gradient norm is above faults.skip_above"
        mine = json.dumps(_suspects(batches, rows))
        ranks = [json.loads(text) for text in self.world.gather_texts(mine)]
        samples = [one | {"rank": rank} for rank, found in enumerate(ranks) for one in found]
        broken = [one for one in samples if one["loss"] is None]
        worst = broken or sorted(samples, key=lambda one: -one["loss"])
        budget = f"({self.record.in_row} in a row, faults.budget = {self.faults.budget})"
        done = "it was taken" if updated else f"nothing was updated {budget}"
        if self.world.main:
            log.warning(
                "step %d: %s; %s. %s: %s",
                *(
                    step,
                    what,
                    done,
                    "Not finite in" if broken else "Samples of the greatest losses",
                ),
                listed(f"{one['key']} (rank {one['rank']})" for one in worst),
            )
        self.note(step, what, taken=updated, loss=loss, norm=norm, samples=worst)

    @property
    def exhausted(self) -> bool:
        """Whether more steps were skipped in a row than the budget allows."""
        return self.record.in_row > self.faults.budget

    @property
    def may_go_back(self) -> bool:
        """Whether the run may return to a checkpoint once more."""
        return self.record.rollbacks < self.faults.rollbacks

    def given_up(self, why: str) -> UserError:
        """Report that the run cannot go on by itself."""
        step = self.judged[0] + 1
        self.note(step, f"given up: {why}", skipped=self.record.skipped)
        return UserError(
            f"before step {step}, {self.record.in_row} steps in a row were skipped for their "
            f"numbers (faults.budget = {self.faults.budget}), and {why} (faults.rollbacks = "
            f"{self.faults.rollbacks}): lower optim.lr, or look at the samples that "
            f"{self.folder / FILE} names"
        )

    def figures(self) -> dict[str, float]:
        """Give what a log takes."""
        return {
            "faults/skipped_steps": self.record.skipped,
            "faults/rollbacks": self.record.rollbacks,
        }

    def note(self, step: int, what: str, **facts: Any) -> None:
        """Append a line to `faults.jsonl`; of the main process, and where the disk has room."""
        if not self.world.main:
            return
        known = {key: _written(value) for key, value in facts.items()}
        line = {"step": step, "passed": self.record.passed, "what": what, "time": time.time()}
        try:
            with (self.folder / FILE).open("a") as file:
                file.write(json.dumps(line | known) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.folder / FILE, error.strerror)

    def _unusual(self, loss: float, norm: float) -> str:
        """Say what is unusual about a step, empty if nothing is."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        times = min(filter(None, (self.faults.report_above, self.faults.skip_above)), default=0.0)
        limits = self.record.limits(times)
        for name, value, limit in zip(("loss", "gradient norm"), (loss, norm), limits, strict=True):
            if value > limit:
                return f"the {name} is {value:.4g}, where {limit:.4g} is the most that is usual"
        return ""


def _suspects(batches: Sequence[Batch], rows: Sequence[Tensor]) -> list[dict[str, Any]]:
    """List this rank's samples whose loss is not finite (None), or else those of the greatest."""
    found = [
        {"key": key, "micro_step": micro, "loss": _written(loss)}
        for micro, (batch, losses) in enumerate(zip(batches, rows, strict=True))
        for key, loss in zip(batch.keys, losses.tolist(), strict=True)
    ]
    broken = [one for one in found if one["loss"] is None]
    return broken or sorted(found, key=lambda one: -one["loss"])[:NAMED]


def _written(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
