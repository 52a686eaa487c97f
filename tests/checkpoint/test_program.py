"""The real program where saving fails or goes elsewhere: nothing is lost, and it says so."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.program import Running, refused
from tests.test_loop import close, wait_for
from tests.tiny import STEPS, Tiny, checkpoints, curve, lines, steps, tiny
from twinflow_train.checkpoint.inspecting import find, look

TOO_SMALL = 200_000
"""Bytes: the tiny run's checkpoints have more in one file, nothing else that it writes has."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run.program.run(*run.words(folder)).code == 0
    return folder


def limit(process: Running, size: int) -> None:
    """Let a running process make no file longer than `size`."""
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def whole(where: Path | str) -> list[int]:
    """List the steps whose checkpoints are right in every byte."""
    return [int(p.name[5:13]) for p in find(str(where)) if not look(p, bytewise=True).fault]


def test_the_seconds_of_saving_are_in_the_log(undisturbed: Path) -> None:
    trained = [line for line in lines(undisturbed) if "loss/total" in line]
    assert ["time/save_stall" in line for line in trained] == [False] * 4 + [True] * 8
    assert all(0 < line["time/save_stall"] < 60 for line in trained[4:])
    assert 0 < trained[-1]["time/save"] < 60


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    run: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = run.program.start(*run.words(folder))
    limit(process, TOO_SMALL)
    wait_for(process, process.folder / "err", "was NOT saved")
    limit(process, resource.RLIM_INFINITY)
    ended = process.wait()
    assert ended.code == 0, ended.err
    (warning, *_) = [line for line in ended.errors if "NOT saved" in line]
    assert f"step 4 was NOT saved: {folder}/checkpoints/step-00000004.partial" in warning
    assert "File too large (rank 0)" in warning
    assert curve(folder) == curve(undisturbed)
    assert whole(folder)[-1] == STEPS
    assert not list((folder / "checkpoints").glob("*.partial"))


def test_a_disk_that_stays_full_is_told_at_the_end_and_costs_no_checkpoint(
    run: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for name in ("checkpoints/step-00000012", "export"):
        shutil.rmtree(folder / name)
    process = run.program.start(*run.words(folder))
    limit(process, TOO_SMALL)
    ended = process.wait()
    assert ended.code == 2
    warning, error = ended.errors
    assert "step 12 was NOT saved" in warning
    assert error.startswith("error: the last save failed: ")
    assert "File too large" in error
    assert whole(folder) == [8]
    assert (folder / "export" / "transformer" / "config.json").exists()
    assert run.program.run(*run.words(folder, "resume=must")).code == 0
    assert curve(folder) == curve(undisturbed)
    assert whole(folder) == [8, 12]


def test_asked_to_stop_on_a_full_disk_it_says_that_it_could_not_save(
    run: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = run.program.start(*run.words(folder, "save_every=0", "steps=5000", "eval_every=0"))
    limit(process, TOO_SMALL)
    wait_for(process, folder / "metrics.jsonl", '"step": 2')
    process.send(signal.SIGTERM)
    ended = process.wait()
    assert ended.code == 2
    assert "error: the last save failed: " in ended.errors[-1]


def test_checkpoints_go_where_a_url_says(run: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    folder, url = tmp_path / "run", f"file://{tmp_path}/else where"
    words = run.words(folder, f"checkpoints='{url}'", "keep_every=8", "keep_last=1")
    process = run.program.start(*words)
    wait_for(process, folder / "metrics.jsonl", '"step": 5')
    process.send(signal.SIGTERM)
    assert process.wait().code == 75
    ended = run.program.run(*words, "resume=must")
    assert ended.code == 0, ended.err
    assert curve(folder) == curve(undisturbed)
    assert whole(url) == [8, 12]
    assert not (folder / "checkpoints").exists()
    refused(run.program.run(*words, "resume=never"), "else where holds an earlier run")
    assert whole(url) == [8, 12]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("s3://bucket/run", ["checkpoints=s3://bucket/run", "Install s3fs"]),
        ("nope://bucket/run", ["checkpoints=nope://bucket/run", "Protocol not known"]),
        ("/proc/self/fd/run", ["checkpoints=/proc/self/fd/run cannot be written"]),
        ("''", ["checkpoints must be a folder, a URL or null"]),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line_before_the_run(
    run: Tiny, tmp_path: Path, where: str, words: list[str]
) -> None:
    folder = tmp_path / "run"
    refused(run.program.run(*run.words(folder, f"checkpoints={where}")), *words)
    assert not folder.exists()


def test_a_rank_that_dies_while_saving_hangs_nobody(
    run: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with run.program.group(2, *run.words(folder)) as ranks:
        partial = folder / "checkpoints" / "step-00000008.partial"
        while not partial.exists():
            assert ranks[0].alive
            time.sleep(0.0005)
        ranks[1].send(signal.SIGKILL)
        assert ranks[1].wait().code == -signal.SIGKILL
        assert ranks[0].wait(100).code != 0
    assert set(whole(folder)) <= {4, 8}
    assert whole(folder)
    ended = run.program.run_group(2, *run.words(folder, "resume=must"))
    assert [one.code for one in ended] == [0, 0], ended[0].err
    close(curve(folder), curve(undisturbed), 1e-5)
    assert steps(folder) == list(range(STEPS))
    assert checkpoints(folder) == checkpoints(undisturbed)


def test_a_second_ctrl_c_does_not_wait_for_a_disk_that_hangs(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run.program.group(2, *run.words(folder, "steps=5000", "eval_every=0")) as ranks:
        wait_for(ranks[0], folder / "metrics.jsonl")
        partial = folder / "checkpoints" / "step-00000004.partial"
        partial.mkdir(parents=True)
        os.mkfifo(partial / "rank-00001.safetensors")  # opening it waits for a reader: none comes
        wait_for(ranks[0], folder / "metrics.jsonl", '"step": 7')
        for number in range(2):
            assert [rank.alive for rank in ranks] == [True, True]
            for rank in ranks:
                rank.send(signal.SIGINT)
            time.sleep(1 - number)
        ended = [rank.wait(20) for rank in ranks]
    assert {one.code for one in ended} <= {-signal.SIGINT, 130}
    assert not [one.err for one in ended if "Traceback" in one.err]
