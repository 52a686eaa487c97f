"""Job arrays on a real Slurm: a sweep through Hydra and submitit, and the preparation of a set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.encoding.jobs import pipeline
from tests.encoding.tools import write_folder
from tests.tiny import STEPS, steps, words
from twinflow_train.data.shards import ShardSet


def test_a_sweep_trains_every_trial(slurm: Slurm, made: Path, tmp_path: Path) -> None:
    """Two trials of two ranks each, on both nodes."""
    ended = slurm.run(
        *(sys.executable, "-m", "twinflow_train.train", "--multirun", "hydra/launcher=slurm"),
        *(
            "hydra.launcher.nodes=2",
            "hydra.launcher.cpus_per_task=1",
            "hydra.launcher.timeout_min=30",
        ),
        f"hydra.sweep.dir={tmp_path}/sweep",
        *words(made, f"{tmp_path}/trial-${{hydra:job.num}}", "eval_every=0", "optim.lr=1e-3,2e-3"),
    )
    assert ended.returncode == 0, ended.stderr
    for number, rate in enumerate((1e-3, 2e-3)):
        manifest = json.loads((tmp_path / f"trial-{number}" / "manifest.json").read_text())
        assert (manifest["ranks"], manifest["config"]["optim"]["lr"]) == (2, rate)
        assert steps(tmp_path / f"trial-{number}") == list(range(STEPS))


def test_the_tasks_of_an_array_prepare_one_set(
    slurm: Slurm, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, made = write_folder(tmp_path / "the source", range(9)), tmp_path / "set"
    job = slurm.submit(
        *("--array=4-5", "--gres=gpu:1", "--cpus-per-task=1", f"--output={tmp_path}/%a.out"),
        *("launch/prepare.sbatch", f"source.path='{source}'", f"folder={made}"),
        *(f"encoders.path={pipeline(tmp_path_factory)}", "images.side=64"),
        *("samples_per_shard=2", "batch=2", "loaders=2"),
    )
    job.wait(400)
    told = [(tmp_path / f"{task}.out").read_text() for task in (4, 5)]
    assert all(f"worker {n} of 2: " in one for n, one in enumerate(told, 1)), told
    assert sum("is whole: 9 samples in 5 shards" in one for one in told) == 1, told
    assert sum(ShardSet(made).counts) == 9
