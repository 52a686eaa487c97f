"""Ranks that take steps of real data, and say what they saw."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twinflow_train import place
from twinflow_train.batch import Batch
from twinflow_train.data.feed import Feed
from twinflow_train.data.loader import OnError, Shards, prefetch
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to show: options of `Shards`, and how many steps of how many samples.

    patience: seconds that a range may take, None for as many as always.
    """

    options: Mapping[str, Any]
    batch: int
    steps: int
    first: int = 0
    patience: int | None = None

    def data(self) -> Shards:
        """Make what shows them."""
        options = dict(self.options)
        return Shards(**options | {"on_error": OnError[options.get("on_error", "raise")]})


@dataclass(frozen=True)
class Step:
    """A rank's step."""

    batches: list[Batch]


@dataclass(kw_only=True)
class Seen:
    """What a rank saw: the keys of each step, how many were skipped, and what ended it."""

    keys: list[list[str]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    error: str = ""


def take(world: World, job: Job) -> Seen:
    """Take the steps of a job as training does."""
    seen, patience = Seen(), place.PATIENCE
    place.PATIENCE = job.patience or patience
    try:
        data = job.data()
        deal = Deal(batch=job.batch, micro_batch=1, ranks=world.size, rank=world.rank)
        stream = data.stream(seed=3, batch=job.batch)

        def steps(first: int) -> Generator[Step]:
            batches = data.batches(stream, rows=deal.rows(), groups=[job.batch], step=first)
            return prefetch(map(Step, batches), data.prefetch)

        with Feed(steps=steps, world=world, budget=data.skip_budget) as feed:
            for number in range(job.first, job.first + job.steps):
                step = feed.take(number)
                seen.keys.append([key for batch in step.batches for key in batch.keys])
                seen.skipped.append(feed.skipped)
    except UserError as error:
        seen.error = str(error)
    finally:
        place.PATIENCE = patience
    return seen


def take_all(world: World, jobs: Sequence[Job]) -> list[Seen]:
    """Take the steps of one job after the other."""
    return [take(world, job) for job in jobs]


def together(seen: Sequence[Seen], step: int) -> list[str]:
    """Return the keys of a global batch, in the order of its rows."""
    return [key for rows in zip(*(one.keys[step] for one in seen), strict=True) for key in rows]
