"""Ranks that die, hang or are asked to stop, in the real program and under the real launcher."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.test_loop import INTERRUPTED, close, sums, wait_for
from tests.tiny import STEPS, Tiny, curve, steps, tiny
from twinflow_train.faults import HUNG

QUICK = ("eval_every=0", "evals.images=10", "evals.samplers=[{steps: 1}]")
BASE = ("evals.base=[{steps: 1, style: multi}]", "micro_batch=2", "save_every=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = run.program.run_group(2, *words(run, folder))
    assert [one.code for one in ended] == [0, 0], ended[0].err
    return folder


def words(run: Tiny, folder: Path, *more: str) -> list[str]:
    return run.words(folder, *QUICK, *BASE, *more)


def finish(run: Tiny, folder: Path, whole: Path, *more: str) -> None:
    """Start again, and hold that the run ends as if nothing had been."""
    ended = run.program.run_group(2, *words(run, folder, *more))
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert curve(folder) == curve(whole)
    assert sums(folder) == sums(whole)


def test_where_a_rank_dies_the_others_end_at_once(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run.program.group(2, *words(run, folder)) as ranks:
        wait_for(ranks[0], folder / "metrics.jsonl", '"step": 5,')
        ranks[1].send(signal.SIGKILL)
        began = time.monotonic()
        ended = ranks[0].wait()
    assert ended.code not in (0, 2, INTERRUPTED)
    assert time.monotonic() - began < 30
    finish(run, folder, whole)


def test_where_a_rank_hangs_the_others_end_and_say_where_they_were(
    run: Tiny, whole: Path, tmp_path: Path
) -> None:
    folder, limit = tmp_path / "run", "faults.hang_seconds=5"
    with run.program.group(2, *words(run, folder, "steps=5000", limit)) as ranks:
        wait_for(ranks[0], folder / "metrics.jsonl", '"step": 6,')
        ranks[1].send(signal.SIGSTOP)
        began = time.monotonic()
        ended = ranks[0].wait()
        assert ranks[1].alive
        ranks[1].send(signal.SIGKILL)
        ranks[1].wait()
    assert ended.code == HUNG
    assert 4 < time.monotonic() - began < 40
    assert "did not end in 5 seconds; see" in ended.err
    told = (folder / "stacks" / "rank-0.txt").read_text()
    assert "in train" in told
    assert (folder / "stacks" / "collectives-0.pickle").stat().st_size > 1000


def test_a_long_evaluation_is_no_hang(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = "evals.samplers=[{steps: 700}]"
    began = time.monotonic()
    ended = run.program.run(
        *words(run, folder, slow, "evals.images=100", "steps=2", "faults.hang_seconds=2")
    )
    assert ended.code == 0, ended.err
    assert time.monotonic() - began > 4
    assert not (folder / "stacks").exists()


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 4)])
def test_asked_to_stop_all_ranks_save_the_same_step(
    run: Tiny, tmp_path: Path, number: signal.Signals, ranks: int
) -> None:
    folder = tmp_path / "run"
    arguments = words(run, folder, "steps=5000", "save_every=0")
    with run.program.group(ranks, *arguments) as processes:
        wait_for(processes[0], folder / "metrics.jsonl", '"step": 2,')
        processes[-1].send(number)
        codes = [process.wait().code for process in processes]
    assert codes == [INTERRUPTED] * ranks
    (saved,) = (folder / "checkpoints").iterdir()
    assert steps(folder) == list(range(int(saved.name[-8:])))


# The real launcher


@contextmanager
def agent(
    run: Tiny, *launcher: str, words: list[str], port: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start one node's torchrun, in a process group of its own."""
    usual = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test")
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *usual, *launcher),
            *("-m", "twinflow_train.train", *words),
        ],
        cwd=run.folder,
        env=dict(os.environ) | environment | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in (*children(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """List the processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def rank(of: subprocess.Popen[bytes], number: int) -> int:
    """Return the process of a rank."""
    found = {environment_of(pid).get("RANK"): pid for pid in children(of.pid)}
    return found[str(number)]


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None, f"torchrun ended with {process.poll()}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)


def wait_for_port(port: int) -> None:
    """Wait until somebody listens: the first node is where the nodes meet."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "nobody listens"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_torchrun_restarts_after_a_dead_a_hung_and_an_interrupted_rank(
    run: Tiny, whole: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = words(run, folder, "faults.hang_seconds=5")
    launcher = ("--nnodes=1", "--nproc-per-node=2", "--max-restarts=3")
    with agent(run, *launcher, words=arguments, port=free_port(), log=log) as process:
        for step, number in ((3, signal.SIGKILL), (6, signal.SIGSTOP), (9, signal.SIGUSR1)):
            wait_for_step(process, folder, step)
            os.kill(rank(process, 1), number)
        process.wait(240)
    assert process.returncode == 0, log.read_text()
    assert curve(folder) == curve(whole)
    assert steps(folder) == list(range(STEPS))


def test_torchrun_goes_on_with_fewer_nodes(run: Tiny, whole: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "run", free_port()
    quick = "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"
    launcher = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", quick)
    log, other = tmp_path / "log", tmp_path / "other"
    with agent(run, *launcher, words=words(run, folder), port=port, log=log) as first:
        wait_for_port(port)
        with agent(run, *launcher, words=words(run, folder), port=port, log=other):
            wait_for_step(first, folder, 3)
            assert json.loads((folder / "manifest.json").read_text())["ranks"] == 2
        first.wait(240)
    assert first.returncode == 0, log.read_text()
    assert json.loads((folder / "manifest.json").read_text())["ranks"] == 1
    close(curve(folder), curve(whole), 1e-5)


def test_fewer_nodes_that_do_not_divide_the_batch_are_refused_in_a_line(
    run: Tiny, tmp_path: Path
) -> None:
    """As after three of four nodes are left."""
    ended = run.program.run_group(3, *words(run, tmp_path / "run"))
    assert [one.code for one in ended] == [2] * 3
    assert "batch = 8 does not divide by micro_batch x ranks = 2 x 3" in ended[0].err
