"""The launch scripts: readable help, clear refusals, and the command that they end in."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
JOBS = ("launch/slurm.sbatch", "launch/prepare.sbatch")
HELPFUL = (
    *("launch/torchrun.sh", "launch/submit.sh", "launch/preflight.sh", "launch/worker.sh"),
    *("launch/ranks.sh", *JOBS),
)
READ = ("launch/lib.sh", "launch/env.sh", "launch/site.example.sh")
"""Scripts that others read, and nobody starts."""
OVERRIDES = ["experiment=digits_flow", "name=a b", "data.path='x;y'", "--cfg", "job"]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.run(
        command, cwd=TOP, env=inherited | env, capture_output=True, text=True, timeout=120
    )


def test_no_script_is_forgotten() -> None:
    found = {f"launch/{path.name}" for path in (TOP / "launch").glob("*.s*")}
    assert found - {"launch/site.sh"} == {*HELPFUL, *READ}


@pytest.mark.parametrize("script", [*HELPFUL, *READ, ".ci/run"])
def test_scripts_parse_and_can_be_started(script: str) -> None:
    assert run("bash", "-n", script).stderr == ""
    assert os.access(TOP / script, os.X_OK) == (script not in READ)


@pytest.mark.parametrize("script", HELPFUL)
def test_help_explains_the_use(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ")


def test_one_node_passes_overrides_through_unchanged() -> None:
    result = run("launch/torchrun.sh", "--gpus", "2", "--dry-run", *OVERRIDES, PYTHON="bash")
    assert shlex.split(result.stdout) == [
        *("bash", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--max-restarts=3", "--no-python", "launch/worker.sh"),
        *("bash", "-m", "twinflow_train.train", *OVERRIDES),
    ]


def test_many_nodes_meet_at_the_head() -> None:
    options = ("--nodes", "2:3", "--gpus", "8", "--head", "node1:29500", "--id", "7", "--dry-run")
    words = shlex.split(run("launch/torchrun.sh", *options, "--", "--help", PYTHON="bash").stdout)
    assert {"--nnodes=2:3", "--nproc-per-node=8", "--rdzv-id=7"} <= set(words)
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=node1:29500"} <= set(words)
    assert words[-3:] == ["-m", "twinflow_train.train", "--help"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus must be a number of at least 1, got '0'"),
        (["--nodes", "two"], "--nodes must be a number of at least 1, got 'two'"),
        (["--nodes", "2"], "--nodes 2 needs --head HOST:PORT, got ''"),
        (["--nodes", "1:2:3", "--head", "a:1"], "--nodes must be N or MIN:MAX, got '1:2:3'"),
        (["--nodes", "3:2", "--head", "a:1"], "--nodes MIN:MAX needs MIN <= MAX, got '3:2'"),
        (["--restarts", "x"], "--restarts must be a number, got 'x'"),
        (["--preflight", "maybe"], "--preflight must be on or off, got 'maybe'"),
        (["--head"], "--head needs a value"),
    ],
)
def test_what_cannot_work_is_refused(options: list[str], message: str) -> None:
    result = run("launch/torchrun.sh", *options)
    assert (result.returncode, result.stderr) == (2, f"torchrun.sh: {message}\n")


def test_an_interpreter_that_is_not_there_is_refused() -> None:
    result = run("launch/torchrun.sh", PYTHON="/nowhere/python")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "no interpreter /nowhere/python: run 'make install', or set PYTHON" in result.stderr


def test_a_script_started_elsewhere_is_refused(tmp_path: Path) -> None:
    for script in ("torchrun.sh", "submit.sh", "preflight.sh"):
        result = subprocess.run(
            (TOP / "launch" / script,), cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 2
        assert "run it from the repository's top" in result.stderr


# What ranks end with, and what becomes of it: torchrun is real, the program ends as it is told


@contextmanager
def started(folder: Path, end: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Start two ranks."""
    options = ("--gpus", "2", "--restarts", "1", "--entry", "tests.launched", "--")
    with subprocess.Popen(
        ("launch/torchrun.sh", *options, end, str(folder), *more),
        cwd=TOP,
        env=os.environ | {"PYTHON": sys.executable, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starts(folder: Path) -> int:
    """Count how often ranks were started, all of them or some."""
    return len({path.name.split("-")[1] for path in folder.glob("start-*")})


def listening(folder: Path) -> bool:
    return len(list(folder.glob("start-*"))) == 2


def alive(folder: Path) -> list[int]:
    """List the ranks that work in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_text().split("\0")
            if words[1:3] == ["-m", "tests.launched"] and str(folder) in words:
                found.append(int(path.parent.name))
    return found


def torchrun(process: subprocess.Popen[str]) -> int:
    """Return the process id of the script's torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.parametrize(
    ("end", "code", "begun"),
    [("end", 0, 1), ("fail", 1, 2), ("fail once", 0, 2), ("refuse", 2, 1), ("refuse alone", 2, 1)],
)
def test_only_a_failure_is_started_anew(tmp_path: Path, end: str, code: int, begun: int) -> None:
    with started(tmp_path, end, *OVERRIDES) as process:
        process.communicate(timeout=120)
        assert (process.returncode, starts(tmp_path)) == (code, begun)
    assert not alive(tmp_path)
    if end == "end":
        for rank in (0, 1):
            assert (tmp_path / f"words-{rank}").read_text().split("\n") == OVERRIDES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_are_asked_to_stop_save(tmp_path: Path, number: signal.Signals) -> None:
    """A terminal's Ctrl-C reaches the whole group, as here; `kill` reaches the script alone."""
    with started(tmp_path, "save") as process:
        until(lambda: listening(tmp_path))
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        process.communicate(timeout=60)
        assert (process.returncode, starts(tmp_path)) == (75, 1)


def test_a_signal_of_slurms_reaches_the_ranks_and_harms_nobody_else(tmp_path: Path) -> None:
    with started(tmp_path, "save") as process:
        until(lambda: listening(tmp_path))
        os.killpg(process.pid, signal.SIGUSR1)
        for pid in alive(tmp_path):
            os.kill(pid, signal.SIGUSR1)
        process.communicate(timeout=60)
        assert (process.returncode, starts(tmp_path)) == (75, 1)


def begun(folder: Path) -> bool:
    return len(list(folder.glob("begun-*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_before_they_listen_ranks_have_nothing_to_save(
    tmp_path: Path, number: signal.Signals
) -> None:
    with started(tmp_path, "save late") as process:
        until(lambda: begun(tmp_path))
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        process.communicate(timeout=60)
        assert (process.returncode, starts(tmp_path)) == (75, 0)


def test_asked_to_stop_before_there_are_ranks_it_has_nothing_to_save(tmp_path: Path) -> None:
    with started(tmp_path, "save") as process:
        assert process.stdout is not None
        assert "torch.distributed.run" in process.stdout.readline()
        process.terminate()
        process.communicate(timeout=60)
        assert (process.returncode, starts(tmp_path)) == (75, 0)


def test_asked_to_stop_when_it_is_done_it_is_done(tmp_path: Path) -> None:
    with started(tmp_path, "end when asked") as process:
        until(lambda: listening(tmp_path))
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_rank_that_does_not_stop_is_killed_and_has_not_saved(tmp_path: Path) -> None:
    with started(tmp_path, "hang") as process:
        until(lambda: listening(tmp_path))
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode not in (0, 2, 75)
    assert not alive(tmp_path)


def test_a_signal_that_comes_too_early_is_told_again(tmp_path: Path) -> None:
    with started(tmp_path, "save late") as process:
        until(lambda: begun(tmp_path))
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
        assert (process.returncode, starts(tmp_path)) == (75, 1)


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    with started(tmp_path, "save") as process:
        until(lambda: listening(tmp_path))
        for pid in alive(tmp_path):
            os.kill(pid, signal.SIGSTOP)  # it does not hear
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 130
        until(lambda: not alive(tmp_path))


def test_no_rank_outlives_its_torchrun(tmp_path: Path) -> None:
    with started(tmp_path, "save") as process:
        until(lambda: listening(tmp_path))
        os.kill(torchrun(process), signal.SIGKILL)
        process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGKILL
        until(lambda: not alive(tmp_path))


def test_a_node_that_is_ready_passes_the_preflight(tmp_path: Path) -> None:
    result = run("launch/preflight.sh", "--gpus", "2", "--shared", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "all-reduce of 16 MiB over 2 ranks:" in result.stdout
    assert result.stdout.splitlines()[-1] == "preflight: ok"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "options", "number"),
    [
        ("launch/preflight.sh", (), signal.SIGTERM),
        ("launch/preflight.sh", (), signal.SIGINT),
        ("launch/torchrun.sh", ("--entry", "tests.launched", "end"), signal.SIGTERM),
    ],
)
def test_nodes_that_wait_for_others_can_be_stopped(
    script: str, options: Sequence[str], number: signal.Signals
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (script, "--nodes", "2", "--gpus", "1", "--head", f"127.0.0.1:{port - 1}", *options)
    env = os.environ | {"PYTHON": sys.executable}
    with subprocess.Popen(
        words, cwd=TOP, env=env, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert b"torch.distributed.run" in process.stdout.readline()
            time.sleep(0.5)
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            assert process.wait(60) in (75, 130)
            assert not members(process.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def members(session: int) -> list[int]:
    """List the living processes of a session."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    found = [(text.partition(" ")[0], text.rpartition(")")[2].split()) for text in stats]
    return [int(pid) for pid, words in found if int(words[3]) == session and words[0] not in "ZX"]


def test_what_is_not_ready_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ("--bandwidth", "1e6", "--shared", str(tmp_path / "file"), "--skew", "100")
    result = run("launch/preflight.sh", "--gpus", "2", *options)
    assert result.returncode == 2
    problems = [line for line in result.stderr.splitlines() if line.startswith("preflight: ")]
    assert len(problems) == 2
    assert "cannot write and lock files there" in problems[0]
    assert "GB/s is below --bandwidth 1e+06" in problems[1]


# Job scripts: what a real Slurm makes of them is in tests/cluster


@pytest.mark.parametrize("script", JOBS)
def test_a_job_script_refuses_to_run_outside_slurm(script: str) -> None:
    result = run(script)
    assert result.returncode == 2
    assert "start it with sbatch" in result.stderr
