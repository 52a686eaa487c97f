"""The launch scripts: readable help, clear refusals, and the command that they end in."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
SCRIPTS = ("launch/torchrun.sh", "launch/slurm.sbatch", "launch/prepare.sbatch", ".ci/run")
OVERRIDES = ["experiment=digits_flow", "name=a b", "data.path='x;y'", "--cfg", "job"]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.run(
        command, cwd=TOP, env=inherited | env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_started(script: str) -> None:
    assert run("bash", "-n", script).stderr == ""
    assert os.access(TOP / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_help_explains_the_use(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ")


def test_one_node_passes_overrides_through_unchanged() -> None:
    result = run("launch/torchrun.sh", "--gpus", "2", "--dry-run", *OVERRIDES, PYTHON="py")
    assert shlex.split(result.stdout) == [
        *("py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "twinflow_train.train", *OVERRIDES),
    ]


def test_many_nodes_meet_at_the_head() -> None:
    options = ("--nodes", "3", "--gpus", "8", "--head", "node1:29500", "--id", "7", "--dry-run")
    words = shlex.split(run("launch/torchrun.sh", *options, "--", "--help").stdout)
    assert {"--nnodes=3", "--nproc-per-node=8", "--rdzv-id=7"} <= set(words)
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=node1:29500"} <= set(words)
    assert words[-3:] == ["-m", "twinflow_train.train", "--help"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus must be a number of at least 1, got '0'"),
        (["--nodes", "two"], "--nodes must be a number of at least 1, got 'two'"),
        (["--nodes", "2"], "--nodes 2 needs --head HOST:PORT, got ''"),
        (["--head"], "--head needs a value"),
    ],
)
def test_what_cannot_work_is_refused(options: list[str], message: str) -> None:
    result = run("launch/torchrun.sh", *options)
    assert (result.returncode, result.stderr) == (2, f"torchrun.sh: {message}\n")


def test_the_command_starts_every_process() -> None:
    # torchrun is real; in the trainer's place stands a line that says who it is.
    line = run("launch/torchrun.sh", "--gpus", "2", "--dry-run", PYTHON=sys.executable).stdout
    # One write a process: two that print into one pipe may mix words and line ends.
    code = "import os; e = os.environ; "
    code += "os.write(1, f\"rank {e['RANK']} of {e['WORLD_SIZE']}\\n\".encode())"
    command = shlex.split(line)[: -len(("-m", "twinflow_train.train"))]
    result = run(*command, "--no-python", sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_slurm_job_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    """Slurm's own commands are stand-ins here, with the answers that Slurm gives."""
    for name, code in (("scontrol", "printf 'node3\\nnode4\\n'"), ("srun", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    result = run(
        *("launch/slurm.sbatch", *OVERRIDES),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="12345",
        SLURM_JOB_NODELIST="node[3-4]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="4",
        SLURM_CPUS_ON_NODE="64",
        SLURM_RESTART_COUNT="1",
        SLURM_SUBMIT_DIR=str(TOP),
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[words.index("launch/torchrun.sh") :] == [
        *("launch/torchrun.sh", "--nodes", "2", "--gpus", "4", "--head", "node3:22345"),
        *("--id", "12345-1", "--", *OVERRIDES),
    ]
    assert "--cpus-per-task=64" in words


def test_a_task_of_a_job_array_prepares_with_a_process_a_gpu(tmp_path: Path) -> None:
    """torchrun.sh prints the command; in Python's place stands a program that does nothing."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(TOP)}
    result = run("launch/prepare.sbatch", *OVERRIDES, PYTHON=str(python), **env)
    assert result.returncode == 0, result.stderr
    assert shlex.split(result.stdout) == [
        *(str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "twinflow_train.prepare", *OVERRIDES),
    ]


@pytest.mark.parametrize("script", SCRIPTS[1:3])
def test_a_job_script_refuses_to_run_outside_slurm(script: str) -> None:
    result = run(script)
    assert result.returncode == 2
    assert "start it with sbatch" in result.stderr
