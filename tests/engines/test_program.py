"""The real program takes either engine, and goes from one to the other, with the same losses."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.program import refused
from tests.test_loop import INTERRUPTED, close, wait_for
from tests.test_run import EXPERIMENTS, composed
from tests.tiny import Tiny, curve, steps, tiny
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.single import Single
from twinflow_train.engines.zero3 import ZeRO3
from twinflow_train.run import GROUPS

STEPS = 24
KINDS = {"fsdp2": FSDP2, "zero3": ZeRO3, "single": Single}

Leg = tuple[int, str]
LIVES: dict[str, list[Leg]] = {
    "there and back": [(2, "fsdp2"), (2, "zero3"), (2, "fsdp2")],
    "fsdp2 grows": [(1, "fsdp2"), (2, "fsdp2"), (4, "fsdp2")],
    "zero3 grows": [(1, "zero3"), (2, "zero3"), (4, "zero3")],
}
"""Ranks and engine, from one stop to the next."""
ALONE = ("micro_batch=8", "objective.teacher_decay=0", "optim.clip=0")
"""What one GPU without shards asks for; its clipping is another one."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one rank and FSDP2 that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    go_on(run, folder, (1, "fsdp2"), stop=False)
    return folder


def go_on(run: Tiny, folder: Path, leg: Leg, *more: str, stop: bool) -> None:
    """Begin a run or continue it, to its end, or until it is asked to stop after some steps."""
    ranks, engine = leg
    begun = len(steps(folder)) if folder.exists() else 0
    words = run.words(
        folder,
        *(f"engine={engine}", f"steps={STEPS}", "micro_batch=2", "save_every=0", "eval_every=0"),
        *("evals.samplers=[{steps: 1}]", "evals.base=[{steps: 1, style: multi}]"),
        f"resume={'must' if begun else 'never'}",
        *more,
    )
    with run.program.group(ranks, *words) as processes:
        if stop:
            wait_for(processes[0], folder / "metrics.jsonl", f'"step": {begun + 1}')
            processes[-1].send(signal.SIGTERM)
        ended = [process.wait() for process in processes]
    assert [one.code for one in ended] == [INTERRUPTED if stop else 0] * ranks, ended[0].err
    assert [one.errors for one in ended] == [[]] * ranks
    config = json.loads((folder / "manifest.json").read_text())["config"]
    assert config["engine"]["_type"] == KINDS[engine].__name__
    assert begun < len(steps(folder)) <= STEPS - stop


@pytest.mark.parametrize("life", list(LIVES))
def test_engines_and_ranks_may_change_at_every_stop(
    run: Tiny, undisturbed: Path, tmp_path: Path, life: str
) -> None:
    folder = tmp_path / "run"
    *stopped, last = LIVES[life]
    for leg in stopped:
        go_on(run, folder, leg, stop=True)
    go_on(run, folder, last, stop=False)
    assert steps(folder) == list(range(STEPS))
    close(curve(folder), curve(undisturbed), 1e-5)


def test_one_gpu_without_shards_is_the_same_run_too(run: Tiny, tmp_path: Path) -> None:
    folder, ordinary = tmp_path / "run", tmp_path / "ordinary"
    go_on(run, ordinary, (1, "fsdp2"), *ALONE, stop=False)
    go_on(run, folder, (1, "single"), *ALONE, stop=True)
    go_on(run, folder, (1, "fsdp2"), *ALONE, stop=True)
    go_on(run, folder, (1, "single"), *ALONE, stop=False)
    assert steps(folder) == list(range(STEPS))
    close(curve(folder), curve(ordinary), 1e-5)
    assert (folder / "export" / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("engine", list(GROUPS["engine"]))
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_every_engine(name: str, engine: str) -> None:
    """What an experiment says of its engine has to be understood by all of them."""
    own = composed(f"experiment={name}", "steps=2")
    ours = composed(f"experiment={name}", f"engine={engine}", "steps=2")
    assert isinstance(ours.engine, type(GROUPS["engine"][engine]))
    shared = ("precision", "recompute", "keep_products")
    assert [vars(ours.engine)[key] for key in shared] == [vars(own.engine)[key] for key in shared]


@pytest.mark.parametrize(
    ("engine", "key", "near"),
    [
        ("zero3", "reshard", "Allowed here: precision, recompute, "),
        ("fsdp2", "offload_weights", "did you mean 'offload'"),
    ],
)
def test_what_only_another_engine_has_is_refused_by_key(
    run: Tiny, tmp_path: Path, engine: str, key: str, near: str
) -> None:
    words = run.words(tmp_path / "run", f"engine={engine}", f"engine.{key}=true")
    refused(run.program.run(*words), f"unknown key 'engine.{key}'", near)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("engine=fsdp2", "engine.shard_over=3"),
            "engine.shard_over = 3 does not divide the 2 ranks of this job",
        ),
        (("engine=zero3", "micro_batch=8"), "batch = 8 does not divide by"),
        (
            ("engine=zero3", "engine.recompute=1", "engine.keep_products=true"),
            "engine.keep_products does not work with engine=zero3",
        ),
        (("engine=zero3", "optim=adamw8bit"), "optim=adamw8bit does not work with engine=zero3"),
        (("engine=single",), "engine=single is for one GPU, and this job has 2"),
    ],
)
def test_what_does_not_fit_ranks_or_engine_is_one_line_of_a_rank(
    run: Tiny, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    ended = run.program.run_group(2, *run.words(tmp_path / "run", *words))
    assert [one.code for one in ended] == [2, 2]
    lines = [line for one in ended for line in one.errors]
    assert all(said in line and line.startswith("error: ") for line in lines), lines
    assert len(lines) == 1 or "rank 1: " in lines[1]
