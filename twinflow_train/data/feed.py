"""The end of the pipeline: what a rank takes each step, after all ranks agree that all have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

from twinflow_train.batch import Batch
from twinflow_train.dist import World
from twinflow_train.errors import UserError


@runtime_checkable
class Taken(Protocol):
    """One optimizer step of one rank."""

    @property
    def batches(self) -> Sequence[Batch]:
        """Its micro-batches."""
        ...


T = TypeVar("T", bound=Taken)


@dataclass(kw_only=True)
class Feed(Generic[T]):
    """Steps, taken by all ranks alike: an error of one rank's data is raised on every rank.

    budget: samples over all ranks that may be skipped.
    """

    steps: Iterator[T]
    world: World
    budget: int
    skipped: int = 0

    def take(self) -> T:
        """Return the next step; collective.

        Raises:
            UserError: some rank's data cannot be used, or too many samples were skipped.
        """
        problem, step = "", None
        try:
            step = next(self.steps)
        except UserError as error:
            problem = str(error)
        mine = sum(batch.skipped for batch in step.batches) if step else 0
        told = torch.tensor([float(bool(problem)), float(mine)], device=self.world.device)
        failed, skipped = self.world.sum(told).tolist()
        if failed:
            raise UserError(next(text for text in self.world.gather_texts(problem) if text))
        self.skipped += int(skipped)
        if self.skipped > self.budget:
            raise UserError(
                f"{self.skipped} samples could not be used and were skipped, more than "
                f"data.skip_budget = {self.budget}: mend the data, or raise it"
            )
        assert step is not None, "no rank failed"
        return step
