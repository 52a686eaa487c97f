"""A trace of the steps that were asked for, and of no other, also where the run is interrupted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.test_loop import INTERRUPTED, wait_for
from tests.tiny import Tiny, tiny

QUICK = ("eval_every=0", "evals.images=10", "evals.samplers=[{steps: 1}]", "evals.base=[]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


def updates(path: Path) -> int:
    """Count a trace's optimizer steps."""
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert "aten::addmm" in names or "aten::mm" in names
    return sum("Optimizer.step#" in name for name in names)


def test_the_steps_asked_for_are_traced(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = run.words(folder, *QUICK, "steps=5", "profile.steps=1:3", "micro_batch=2")
    ended = run.program.run_group(2, *words)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    (trace,) = (folder / "profile").iterdir()
    assert trace.name == "steps-1-3.json"
    assert updates(trace) == 2


def test_a_trace_that_was_begun_is_written(run: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = run.program.start(*run.words(folder, *QUICK, "steps=900", "profile.steps=2:40"))
    wait_for(process, folder / "metrics.jsonl", '"step": 3,')
    process.send(signal.SIGTERM)
    assert process.wait().code == INTERRUPTED
    assert 1 < updates(folder / "profile" / "steps-2-40.json") < 38
