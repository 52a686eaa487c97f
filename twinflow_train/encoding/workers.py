"""Which worker this is: any number of them share the work without talking to one another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from twinflow_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Worker `number` of `count`, computing on `device`; `speaks`: it shows its progress."""

    number: int
    count: int
    device: torch.device
    speaks: bool

    @staticmethod
    def here(env: Mapping[str, str] = os.environ) -> Worker:
        """Find out from what torchrun and Slurm's job arrays say: each rank of each task is one.

        Raises:
            UserError: the array's numbers have gaps.
        """
        rank, ranks = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        tasks = int(env.get("SLURM_ARRAY_TASK_COUNT", 1))
        first = int(env.get("SLURM_ARRAY_TASK_MIN", 0))
        task = int(env.get("SLURM_ARRAY_TASK_ID", first)) - first
        if task >= tasks:
            raise UserError(
                f"the job array has {tasks} tasks, but this one is number {task + first}, counted "
                f"from {first}: give --array numbers without gaps, as in --array=0-{tasks - 1}"
            )
        gpu = torch.cuda.is_available()
        return Worker(
            number=task * ranks + rank,
            count=tasks * ranks,
            device=torch.device("cuda", int(env.get("LOCAL_RANK", 0)) if gpu else 0)
            if gpu
            else torch.device("cpu"),
            speaks=rank == 0,
        )

    def share(self, shards: int) -> range:
        """Return the numbers of the shards that this worker makes: every `count`-th."""
        return range(self.number, shards, self.count)
