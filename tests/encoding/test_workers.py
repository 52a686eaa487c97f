"""Who is which worker, from what torchrun and Slurm say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinflow_train.encoding.workers import Worker
from twinflow_train.errors import UserError


def test_alone_there_is_one_worker() -> None:
    worker = Worker.here({})
    assert (worker.number, worker.count, worker.speaks) == (0, 1, True)
    assert worker.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@given(
    ranks=st.integers(1, 5),
    tasks=st.integers(1, 6),
    first=st.integers(0, 3),
    shards=st.integers(0, 60),
)
def test_the_ranks_of_all_tasks_make_each_shard_once(
    ranks: int, tasks: int, first: int, shards: int
) -> None:
    made: list[int] = []
    for task in range(first, first + tasks):
        for rank in range(ranks):
            worker = Worker.here(
                {
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                    "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(tasks),
                    "SLURM_ARRAY_TASK_MIN": str(first),
                }
            )  # fmt: skip
            assert worker.speaks == (rank == 0)
            assert worker.count == ranks * tasks
            made += worker.share(shards)
    assert sorted(made) == list(range(shards))


def test_numbers_of_an_array_with_gaps_are_refused() -> None:
    env = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_ID": "5"}
    with pytest.raises(UserError, match=r"2 tasks, but this one is number 5, .* --array=0-1"):
        Worker.here(env)
