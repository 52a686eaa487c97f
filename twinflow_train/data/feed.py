"""The end of the pipeline: what a rank takes each step, after all ranks agree that all have it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
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

    steps: gives all steps from one on. budget: samples over all ranks that may be skipped.
    waited: seconds for which this rank's own data of the last step were not there yet; took: the
    same of all ranks.
    """

    steps: Callable[[int], Generator[T]]
    world: World
    budget: int
    skipped: int = 0
    waited: float = 0.0
    took: float = 0.0
    _running: Generator[T] | None = field(default=None, init=False)
    _next: int = field(default=0, init=False)

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running is not None:
            self._running.close()

    def take(self, number: int) -> T:
        """Return a step; one that does not follow the last is begun at anew. Collective.

        Raises:
            UserError: some rank's data cannot be used, or too many samples were skipped.
        """
        problem, step = "", None
        began = time.perf_counter()
        try:
            step = next(self._from(number))
        except UserError as error:
            problem = str(error)
        self.waited, self._next = time.perf_counter() - began, number + 1
        mine = sum(batch.skipped for batch in step.batches) if step else 0
        # On the CPU, as all that processes tell one another beside the numbers that they train on:
        # a GPU that computes is not waited for.
        told = torch.tensor([float(bool(problem)), float(mine)])
        failed, skipped = self.world.sum(told).tolist()
        self.took = time.perf_counter() - began
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

    def figures(self) -> dict[str, float]:
        """Give what a log takes."""
        return {"data/skipped": self.skipped, "time/data": self.took}

    def _from(self, number: int) -> Generator[T]:
        """Return what yields a step next."""
        if self._running is None or number != self._next:
            if self._running is not None:
                self._running.close()
            self._running = self.steps(number)
        return self._running
