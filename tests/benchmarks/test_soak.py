"""A soak in short: every kind of fault happens, and the run ends with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.soak import KINDS, RANKS, Soak, compare, report, whole
from tests.tiny import tiny

QUICK = ("eval_every=0", "evals.images=10", "evals.samplers=[{steps: 1}]")
BASE = ("evals.base=[{steps: 1, style: multi}]", "micro_batch=2", "save_every=2")


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    """A job after all kinds of faults."""
    run, scratch = tiny(tmp_path_factory), tmp_path_factory.mktemp("soak")
    train = Path(shutil.copytree(run.folder / "train", scratch / "train"))
    soak = Soak(
        program=run.program,
        words=lambda folder: run.words(folder, *QUICK, *BASE, f"data.path={train}"),
        shards=train,
        scratch=scratch,
        most=0.9,
        hang=4.0,
    )
    soak.go_on(faults=len(KINDS))
    return soak


def test_a_run_survives_every_kind_of_fault(soaked: Soak) -> None:
    told = report(soaked)
    assert told["faults"] == dict.fromkeys(KINDS, 1)
    assert told["starts"] > 5  # five of them end it
    assert told["damaged checkpoints passed over"] == 1
    assert sum(told["exit codes"].values()) == RANKS * told["starts"]


def test_another_number_or_another_weight_is_found(soaked: Soak, tmp_path: Path) -> None:
    """Else equal runs would say nothing."""
    run, copy = soaked.scratch / "undisturbed", tmp_path / "copy"
    shutil.copytree(run, copy)
    compare(copy, run)
    path = whole(copy)[-1] / "index.json"
    index = json.loads(path.read_text())
    index["files"]["rank-00001.safetensors"] = "0" * 64
    path.write_text(json.dumps(index))
    with pytest.raises(AssertionError, match="the last checkpoints differ in their files"):
        compare(copy, run)
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"samples": 8', '"samples": 9'))
    with pytest.raises(AssertionError, match="the metrics differ"):
        compare(copy, run)
