"""Steps with bad numbers, in the real program: skipped, passed over, or the end of the run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.data import poisoned, shown
from tests.program import refused
from tests.test_loop import INTERRUPTED, close, wait_for
from tests.tiny import Tiny, curve, steps, tiny

BAD = 7
LOCAL = 3
"""A row of the role that is trained on its sample as it is."""
PER_EPOCH = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def one_broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A set of which one sample breaks its step, BAD; and its key."""
    top = tmp_path_factory.mktemp("one")
    number = shown(poisoned(top / "plain", lambda _: False), BAD, LOCAL)
    return poisoned(top / "set", lambda n: n == number), f"digit-{number:04d}"


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of which one shard breaks the steps that it is shown in, one after the other."""
    return poisoned(tmp_path_factory.mktemp("shard") / "set", lambda n: n // 24 == 2)


def words(run: Tiny, folder: Path, data: Path, *more: str) -> list[str]:
    """Return a command line without evaluations."""
    usual = [word for word in run.words(folder) if not word.startswith("evals.")]
    changes = (f"data.path={data}", "evals=none", "eval_every=0", "save_every=3", "data.window=1")
    return [*usual, *changes, *more]


def diary(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]


def trained(folder: Path) -> list[dict[str, Any]]:
    return [line for line in curve(folder) if "loss/total" in line]


def epochs(folder: Path) -> list[int]:
    """List the positions in the data of the steps in the log."""
    return [round(line["data/epoch"] * PER_EPOCH) for line in trained(folder)]


# One bad step


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_bad_step_is_skipped_on_all_ranks_and_its_sample_named(
    run: Tiny, one_broken: tuple[Path, str], tmp_path: Path, engine: str
) -> None:
    folder = tmp_path / "run"
    ended = run.program.run_group(2, *words(run, folder, one_broken[0], f"engine={engine}"))
    assert [one.code for one in ended] == [0, 0], ended[0].err
    (warning,) = ended[0].errors
    assert "the loss is nan; nothing was updated (1 in a row, faults.budget = 10)" in warning
    assert f"Not finite in: {one_broken[1]} (rank" in warning
    assert ended[1].errors == []
    assert [one["step"] for one in trained(folder) if one["loss/total"] is None] == [BAD]
    counted = [line["faults/skipped_steps"] for line in trained(folder)]
    assert counted == [0] * BAD + [1] * (12 - BAD)
    assert steps(folder) == list(range(12))
    (told,) = diary(folder)
    assert (told["step"], told["taken"], told["loss"]) == (BAD, False, None)
    assert [sample["key"] for sample in told["samples"]] == [one_broken[1]]
    index = json.loads((folder / "checkpoints" / "step-00000012" / "index.json").read_text())
    assert index["updates"] == 11


def test_resumed_before_or_after_a_skipped_step_a_run_ends_the_same(
    run: Tiny, one_broken: tuple[Path, str], tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run.program.run(*words(run, whole, one_broken[0])).code == 0
    for step in (3, 6, 9):
        process = run.program.start(*words(run, folder, one_broken[0]))
        wait_for(process, folder / "metrics.jsonl", f'"step": {step},')
        process.send(signal.SIGKILL)
        process.wait()
    assert run.program.run(*words(run, folder, one_broken[0])).code == 0
    assert curve(folder) == curve(whole)
    assert curve(whole)[-2]["faults/skipped_steps"] == 1


def test_more_ranks_skip_the_same_step(
    run: Tiny, one_broken: tuple[Path, str], tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for ranks, folder in enumerate(folders, 1):
        assert run.program.run_group(ranks, *words(run, folder, one_broken[0]))[0].code == 0
    bad = [line["loss/total"] is None for line in trained(folders[0])]
    assert bad == [line["loss/total"] is None for line in trained(folders[1])]
    assert bad.count(True) == 1
    finite = [[line for line in trained(f) if line["loss/total"] is not None] for f in folders]
    close(finite[1], finite[0], 1e-5)


# More than the budget


def test_after_its_budget_a_run_goes_back_and_passes_the_data_over(
    run: Tiny, one_shard: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = run.program.run(*words(run, folder, one_shard, "faults.budget=2"))
    assert ended.code == 0, ended.err
    assert steps(folder) == list(range(12))
    wrong = [one for one in diary(folder) if not one.get("taken", True)]
    (back,) = [one for one in diary(folder) if "went back" in one["what"]]
    first = wrong[0]["step"]
    assert [one["step"] for one in wrong[:3]] == [first, first + 1, first + 2]
    assert back["step"] <= first
    assert back["step"] % 3 == 0
    assert back["passed"] == first + 3 - back["step"]
    # Up to the checkpoint the data came in their order; from there on after the bad ones.
    then = [*range(back["step"]), *range(first + 3, first + 3 + 12 - back["step"])]
    assert epochs(folder) == then
    assert trained(folder)[-1]["faults/rollbacks"] == 1
    assert trained(folder)[-1]["faults/skipped_steps"] == len(wrong)


def test_what_came_after_going_back_does_not_depend_on_interruptions(
    run: Tiny, one_shard: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run.program.run(*words(run, whole, one_shard, "faults.budget=2")).code == 0
    for number, text in ((signal.SIGTERM, '"step": 4,'), (signal.SIGKILL, '"step": 8,')):
        process = run.program.start(*words(run, folder, one_shard, "faults.budget=2"))
        wait_for(process, folder / "metrics.jsonl", text)
        process.send(number)
        assert process.wait().code == (INTERRUPTED if number == signal.SIGTERM else -number)
    ended = run.program.run(*words(run, folder, one_shard, "faults.budget=2"))
    assert ended.code == 0, ended.err
    assert trained(folder) == trained(whole)


def test_weights_go_back_to_the_checkpoint(run: Tiny, one_shard: Path, tmp_path: Path) -> None:
    """What is trained after it is what a run trains that was only ever there."""
    folder, other = tmp_path / "run", tmp_path / "other"
    arguments = ("faults.budget=2", "keep_every=3", "log_every=1")
    assert run.program.run(*words(run, folder, one_shard, *arguments)).code == 0
    (back,) = [one for one in diary(folder) if "went back" in one["what"]]
    shutil.copytree(folder, other)
    kept = other / "checkpoints"
    for path in kept.iterdir():
        if path.name > f"step-{back['step']:08d}":
            shutil.rmtree(path)
    assert run.program.run(*words(run, other, one_shard, *arguments, "resume=must")).code == 0
    assert trained(other) == trained(folder)


def test_a_second_time_is_the_end_with_a_report(run: Tiny, one_shard: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = run.program.run(*words(run, folder, one_shard, "faults.budget=0"))
    assert ended.code == 2
    assert "Traceback" not in ended.err
    report = ended.errors[-1]
    assert "1 steps in a row were skipped" in report
    assert "the run has gone back 1 times (faults.rollbacks = 1)" in report
    assert str(folder / "faults.jsonl") in report
    assert "given up" in diary(folder)[-1]["what"]
    again = run.program.run(*words(run, folder, one_shard, "faults.budget=0", "faults.rollbacks=9"))
    assert again.code == 0, again.err
    assert steps(folder) == list(range(12))


def test_without_a_checkpoint_before_it_there_is_no_way_back(
    run: Tiny, one_shard: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ("faults.budget=1", "save_every=0")
    ended = run.program.run_group(2, *words(run, folder, one_shard, *more))
    assert [one.code for one in ended] == [2, 2]
    assert "there is no whole checkpoint up to step" in ended[0].errors[-1]


# Numbers that are only unusual


SQUARED = ("objective=flow_matching", "objective.distance={alpha: 2, c: 1}", "optim.lr=1e-6")
LOUD = (*SQUARED, "steps=44", "save_every=20")
STEP, SAMPLES = 38, 44 * 8


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A set of which one sample, shown at STEP, is forty times too bright; and its key."""
    top = tmp_path_factory.mktemp("bright")
    number = shown(poisoned(top / "plain", lambda _: False, samples=SAMPLES), STEP, LOCAL)
    found = poisoned(top / "set", lambda n: n == number, samples=SAMPLES, factor=40.0)
    return found, f"digit-{number:04d}"


def test_an_outlier_is_told_with_its_samples(
    run: Tiny, bright: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = run.program.run(*words(run, folder, bright[0], *LOUD))
    assert ended.code == 0, ended.err
    (found,) = diary(folder)
    assert (found["step"], found["taken"]) == (STEP, True)
    assert "is the most that is usual" in found["what"]
    assert found["samples"][0]["key"] == bright[1]
    assert f"step {STEP}: the loss is" in ended.errors[0]
    assert trained(folder)[-1]["faults/skipped_steps"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_outlier_is_skipped_where_that_is_asked_for(
    run: Tiny, bright: tuple[Path, str], tmp_path: Path, ranks: int
) -> None:
    folder = tmp_path / "run"
    arguments = words(run, folder, bright[0], *LOUD, "faults.skip_above=20")
    assert [one.code for one in run.program.run_group(ranks, *arguments)] == [0] * ranks
    assert [(one["step"], one["taken"]) for one in diary(folder)] == [(STEP, False)]
    assert trained(folder)[-1]["faults/skipped_steps"] == 1


def test_a_run_that_is_interrupted_skips_the_same_outliers(
    run: Tiny, bright: tuple[Path, str], tmp_path: Path
) -> None:
    arguments = (*LOUD, "faults.skip_above=20")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run.program.run(*words(run, whole, bright[0], *arguments)).code == 0
    process = run.program.start(*words(run, folder, bright[0], *arguments))
    wait_for(process, folder / "metrics.jsonl", '"step": 25,')
    process.send(signal.SIGTERM)
    assert process.wait().code == INTERRUPTED
    assert run.program.run(*words(run, folder, bright[0], *arguments)).code == 0
    assert curve(folder) == curve(whole)
    assert [one["step"] for one in diary(folder)] == [STEP]


def test_there_is_one_line_for_settings_that_cannot_be(run: Tiny, tmp_path: Path) -> None:
    refused(run.program.run(*run.words(tmp_path / "run", "faults.budget=-1")), "faults.budget")
