"""Jobs on a real Slurm of two nodes: run, asked to stop, cancelled, pre-empted, and unlucky."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.hosts import NAMES, TOP, until
from tests.cluster.slurm import Job, Slurm
from tests.tiny import checkpoints, curve, steps, words

SCRIPT = "launch/slurm.sbatch"
STEPS = 30
NEVER = 1000
SMALL = ("--nodes=2", "--gres=gpu:1", "--time=30")


def settings(slurm: Slurm, **env: str) -> dict[str, str]:
    """Return what a job's environment says: one process a node."""
    return {"LOGS": str(slurm.folder / "logs"), "RANKS": "1", "PREFLIGHT": "off"} | env


def begin(slurm: Slurm, made: Path, folder: Path, *more: str, **env: str) -> Job:
    """Submit a run that saves when it has to, and at the end."""
    overrides = words(made, folder, f"steps={STEPS}", f"save_every={NEVER}", "eval_every=0", *more)
    options = (*SMALL, f"--output={folder}.out")
    return slurm.submit(*options, SCRIPT, *overrides, **settings(slurm, **env))


def await_step(job: Job, folder: Path, step: int) -> None:
    """Wait until a run has taken a step."""
    metrics = folder / "metrics.jsonl"
    trained = lambda: metrics.exists() and steps(folder)[-1:] >= [step]  # noqa: E731
    try:
        until(trained, 300, f"step {step}")
    except TimeoutError as error:
        raise AssertionError(f"{error}, {job.state}\n{job.told()}") from None


def send(slurm: Slurm, number: signal.Signals, names: Sequence[str] = NAMES) -> None:
    """Send all trainers on the nodes a signal."""
    for name in names:
        slurm.hosts.send(name, number)


@pytest.fixture(scope="session")
def whole(slurm: Slurm, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-node run that nobody disturbed; tests only read it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = begin(slurm, made, folder, PREFLIGHT="on")
    job.wait(400)
    assert job.state == "COMPLETED", job.told()
    (folder / "job.txt").write_text(job.out())
    return folder


def test_a_job_of_two_nodes_runs_to_its_end(slurm: Slurm, whole: Path) -> None:
    assert steps(whole) == list(range(STEPS))
    assert json.loads((whole / "manifest.json").read_text())["ranks"] == 2
    told = (whole / "job.txt").read_text()
    assert told.count("preflight: ok") == 1
    for name in NAMES:
        assert any(line.split()[:3] == [name, "1", "cpu"] for line in told.splitlines()), told
    assert told.splitlines()[-1].endswith("slurm.sbatch: done")
    logs = [path.read_text() for path in (slurm.folder / "logs").glob("*/*.log")]
    assert len([log for log in logs if "2 x cpu" in log]) == 1  # one rank speaks


def test_before_its_time_limit_a_job_saves_and_goes_on(
    slurm: Slurm, made: Path, whole: Path, tmp_path: Path
) -> None:
    """Slurm's own signal, sent because the limit is near, and not ours."""
    folder = tmp_path / "run"
    job = begin(slurm, made, folder)
    await_step(job, folder, 3)
    send(slurm, signal.SIGSTOP)  # a step that takes as long as Slurm needs to look at the clock
    reached = steps(folder)[-1]
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=4")
    until(lambda: "asked to stop" in job.out(), 90, "Slurm's signal")
    send(slurm, signal.SIGCONT)
    until(lambda: "stopped and saved; queued again" in job.out(), 90, "the job is queued again")
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    (saved,) = checkpoints(folder)
    assert reached < int(saved.removeprefix("step-")) < STEPS
    job.wait(400)
    assert (job.state, job.show("Restarts")) == ("COMPLETED", "1"), job.told()
    assert curve(folder) == curve(whole)


def test_a_cancelled_job_saves_and_stays_cancelled(
    slurm: Slurm, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = begin(slurm, made, folder)
    await_step(job, folder, 3)
    job.cancel()
    for name in NAMES:
        until(lambda: not slurm.hosts.trainers(name), 60, f"{name} is empty")  # noqa: B023
    slurm.await_nodes()
    assert (job.state, job.show("Restarts")) == ("CANCELLED", "0"), job.told()
    (saved,) = checkpoints(folder)
    assert 3 <= int(saved.removeprefix("step-")) < STEPS


def test_a_preempted_job_saves_and_goes_on(
    slurm: Slurm, made: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = begin(slurm, made, folder)
    await_step(job, folder, 3)
    urgent = slurm.submit(
        *("--partition=high", "--nodes=2", "--exclusive", "--time=1"),
        *(f"--output={tmp_path}/urgent.out", "--wrap=sleep 1"),
    )
    urgent.wait(120)
    assert urgent.state == "COMPLETED"
    assert len(checkpoints(folder)) == 1
    job.wait(400)
    assert (job.state, job.show("Restarts")) == ("COMPLETED", "1"), job.told()
    assert curve(folder) == curve(whole)


def test_a_job_survives_that_a_nodes_slurmd_dies(
    slurm: Slurm, made: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = begin(slurm, made, folder, "save_every=2")
    await_step(job, folder, 5)
    slurm.end("node2", signal.SIGKILL)
    send(slurm, signal.SIGSTOP, ["node2"])  # nor does it compute any more
    job.wait(120, "PENDING")
    assert len(steps(folder)) < STEPS
    slurm.begin("node2")
    job.wait(400)
    assert (job.state, job.show("Restarts")) == ("COMPLETED", "1"), job.told()
    assert curve(folder) == curve(whole)


def python(folder: Path, *lines: str) -> str:
    """Write a program to be used as PYTHON; the last line is the real one."""
    path = folder / "python"
    path.write_text("\n".join(("#!/bin/bash", *lines, f'exec "{sys.executable}" "$@"\n')))
    path.chmod(0o755)
    return str(path)


def test_a_crash_is_retried_so_often_and_no_more(slurm: Slurm, made: Path, tmp_path: Path) -> None:
    crash = f'[[ "$*" == *distributed.run* ]] || {{ echo >>"{tmp_path}/tries"; exit 9; }}'
    env = {"PYTHON": python(tmp_path, crash), "RESTARTS": "1", "RETRIES": "1"}
    job = begin(slurm, made, tmp_path / "run", **env)
    job.wait(300)
    assert (job.state, job.show("Restarts")) == ("FAILED", "1"), job.told()
    assert "failed after 1 retries: not queued again" in job.out()
    tries = len((tmp_path / "tries").read_text().splitlines())
    assert (
        4 <= tries <= 8
    )  # on two nodes, two starts of one restart each; one may cut another short


def test_what_the_program_refuses_is_not_retried(slurm: Slurm, made: Path, tmp_path: Path) -> None:
    job = begin(slurm, made, tmp_path / "run", "data.path=nowhere")
    job.wait(300)
    assert (job.state, job.show("Restarts")) == ("FAILED", "0"), job.told()
    assert "error: data.path" in job.out()
    assert job.out().splitlines()[-1].startswith("slurm.sbatch: the program refused to start")


def test_unequal_nodes_are_refused(slurm: Slurm, made: Path, tmp_path: Path) -> None:
    """On node2 stands an older checkout, in a folder of its own."""
    copy = tmp_path / "copy"
    for name in ("twinflow_train", "launch"):
        shutil.copytree(TOP / name, copy / name)
    with (copy / "twinflow_train" / "dist.py").open("a") as file:
        file.write("# changed\n")
    other = python(tmp_path, f'[[ $(hostname) != node2 ]] || cd "{copy}"')
    job = begin(slurm, made, tmp_path / "run", PREFLIGHT="on", PYTHON=other)
    job.wait(300)
    assert (job.state, job.show("Restarts")) == ("FAILED", "0"), job.told()
    assert "preflight: code differs: " in job.out()
    assert "preflight: node2: outputs does not see what 1 of 2 ranks wrote" in job.out()
    assert not (tmp_path / "run").exists()


def test_containers_are_given_to_srun(slurm: Slurm, made: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    odd = ("name='it is [a] name, and $HOME'", 'data.path="x;y"', "--cfg", "job")
    env = {"CONTAINER": str(image), "MOUNTS": "/a:/b", "DRY_RUN": "1", "RANKS": ""}
    job = begin(slurm, made, tmp_path / "run", *odd, **env)
    job.wait(60)
    assert job.state == "COMPLETED"
    told = shlex.split(job.out())
    assert {f"--container-image={image}", "--no-container-mount-home"} <= set(told)
    assert f"--container-mounts={TOP}:{TOP},/a:/b" in told
    starting = told[told.index("launch/torchrun.sh") : told.index("--")]
    port = 20000 + 2 * job.number
    assert starting == [
        *("launch/torchrun.sh", "--nodes", "2", "--gpus", "2", "--head", f"node1:{port}"),
        *("--id", f"{job.number}-0", "--restarts", "3", "--preflight", "off"),
    ]
    assert told[-len(odd) :] == list(odd)


# Before a job is queued


def submit(slurm: Slurm, made: Path, options: Sequence[str], *more: str) -> tuple[int, list[str]]:
    """Run launch/submit.sh, and return its exit code and its lines."""
    overrides = words(made, "unused", *more)
    ended = slurm.run("launch/submit.sh", *options, "--", *overrides, **settings(slurm))
    return ended.returncode, (ended.stdout + ended.stderr).strip().splitlines()


def test_a_job_without_shards_is_not_submitted(slurm: Slurm, made: Path) -> None:
    code, (told,) = submit(slurm, made, SMALL, "data.path=nowhere")
    assert (code, told.startswith("error: data.path")) == (2, True), told


def test_a_job_without_its_account_is_not_submitted(slurm: Slurm, made: Path) -> None:
    code, (told,) = submit(slurm, made, (*SMALL, "--partition=owned"))
    assert (code, "wants an account of team: give --account=NAME" in told) == (2, True), told
    assert submit(slurm, made, (*SMALL, "--partition=owned", "--account=team", "--dry-run"))[0] == 0


def test_a_batch_that_does_not_fit_the_nodes_is_not_submitted(slurm: Slurm, made: Path) -> None:
    code, (told,) = submit(slurm, made, (*SMALL, "-N", "3"))
    assert (code, "does not divide by micro_batch x ranks = 4 x 3" in told) == (2, True), told


def test_what_is_submitted_is_what_was_written(slurm: Slurm, made: Path, tmp_path: Path) -> None:
    options = (*SMALL, "-o", f"{tmp_path}/out")
    odd = "name='it is [a] name, and $HOME'"
    code, (told,) = submit(slurm, made, (*options, "--dry-run"), odd)
    assert code == 0
    assert shlex.split(told) == ["sbatch", *options, SCRIPT, *words(made, "unused", odd)]
