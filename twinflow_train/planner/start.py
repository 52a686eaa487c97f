"""From a run's parts to its plan, and the check at its start."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch

from twinflow_train.data.loader import Shards
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine
from twinflow_train.engines.optim import Optim
from twinflow_train.errors import UserError
from twinflow_train.models.adapter import Adapter
from twinflow_train.models.base import Model
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner.memory import Job
from twinflow_train.planner.plan import unfit
from twinflow_train.planner.settings import Asked, Plans


class Parts(Protocol):
    """What a plan looks at of a run."""

    model: Model
    adapter: Adapter
    objective: TwinFlow
    engine: Engine
    optim: Optim
    average: Averages
    data: Shards
    plan: Plans
    batch: int
    micro_batch: int
    seed: int


def job_of(run: Parts, *, ranks: int, latent: tuple[int, int], text: int, references: int) -> Job:
    """Say what is to be planned, for data of this size (see `Job`)."""
    return Job(
        model=run.model,
        adapter=run.adapter,
        objective=run.objective,
        engine=run.engine,
        optim=run.optim,
        average=run.average,
        batch=run.batch,
        micro_batch=run.micro_batch,
        seed=run.seed,
        latent=latent,
        text=text,
        references=references,
        ranks=ranks,
    )


def refuse_unfit(run: Parts, world: World) -> None:
    """Refuse, or warn of, what does not fit the GPUs: UserError with what would."""
    device, asked = world.device, run.plan.check
    if device.type != "cuda" or asked is Asked.skip:
        return
    total = float(torch.cuda.get_device_properties(device).total_memory)
    if reason := unfit(of_data(run, ranks=world.size), total):
        if asked is Asked.refuse:
            raise UserError(f"{reason}; plan.check=warn starts all the same")
        warnings.warn(reason, stacklevel=2)


def of_data(run: Parts, *, ranks: int) -> Job:
    """Plan for the largest latents of a run's data, and the longest text of a held-out shard."""
    stream, held_out = run.data.stream(seed=run.seed, batch=run.batch), run.data.held_out()
    largest = max(stream.shapes, key=lambda shape: shape[1] * shape[2])
    return job_of(
        run,
        ranks=ranks,
        latent=(largest[1], largest[2]),
        text=max(n for entry in held_out.index(0) for n in entry.tokens),
        references=held_out.manifest.form.references,
    )
