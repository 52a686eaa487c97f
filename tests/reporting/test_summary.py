"""`summary.json`: whole or not at all, read back as written, and shown as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twinflow_train.errors import UserError
from twinflow_train.reporting.summary import conclude, read

ROW: dict[str, Any] = {"model": "ema", "nfe": 1, "style": "few", "accuracy": 0.5, "frechet": None}
SUMMARY: dict[str, Any] = {"results": [ROW], "real": {"accuracy": 0.99}, "name": "a", "step": 3}


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    conclude(tmp_path, SUMMARY, write=True)
    assert read(tmp_path) == SUMMARY
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_table_shows_results_and_what_real_data_reach(tmp_path: Path) -> None:
    text = conclude(tmp_path, SUMMARY, write=False).splitlines()
    assert text[0].split() == ["model", "NFE", "style", "accuracy", "Frechet"]
    assert text[2].split() == ["ema", "1", "few", "0.500", "nan"]
    assert text[3].split() == ["real", "0.990"]
    assert not list(tmp_path.iterdir())


def test_without_results_it_says_so(tmp_path: Path) -> None:
    assert "no results" in conclude(tmp_path, {"results": []}, write=True)
    assert read(tmp_path) == {"results": []}


def test_a_newer_summary_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for step in (1, 2):
        conclude(tmp_path, SUMMARY | {"step": step}, write=True)
    assert read(tmp_path)["step"] == 2


def test_what_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    conclude(tmp_path, SUMMARY, write=True)
    with pytest.raises(TypeError):
        conclude(tmp_path, SUMMARY | {"step": object()}, write=True)
    assert read(tmp_path) == SUMMARY


def test_an_unfinished_run_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json is missing: the run has not finished"):
        read(tmp_path)


def test_a_summary_is_plain_json(tmp_path: Path) -> None:
    conclude(tmp_path, SUMMARY, write=True)
    text = (tmp_path / "summary.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=pytest.fail) == SUMMARY
