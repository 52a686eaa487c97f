"""The dashboard names metrics that runs write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import lines, tiny

FILE = Path(__file__).parent.parent.parent / "docs" / "dashboard.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Name everything that a run with an evaluation writes."""
    run = tiny(tmp_path_factory)
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    ended = run.program.run(*run.words(folder, "steps=3", "save_every=1"))
    assert ended.code == 0, ended.err
    assert "evaluations took" in ended.out
    return {key for line in lines(folder) for key in line}


def panels() -> list[dict[str, Any]]:
    return [
        panel for section in json.loads(FILE.read_text())["sections"] for panel in section["panels"]
    ]


def pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", "[^/]+"))


def test_it_has_the_sections_that_people_look_for() -> None:
    said = json.loads(FILE.read_text())
    assert [section["name"] for section in said["sections"]] == [
        "Quality",
        "Losses",
        "Health",
        "Speed",
    ]
    assert all(panel["kind"] in ("line", "image") for panel in panels())


def test_every_metric_is_one_that_runs_write(written: set[str]) -> None:
    named = [name for panel in panels() if panel["kind"] == "line" for name in panel["metrics"]]
    lost = [name for name in named if not any(pattern(name).fullmatch(key) for key in written)]
    assert not lost
    assert {"eval/nfe1/gap", "eval/failed", "time/eval"} <= written
