"""The benchmark of plans plans, measures and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plan
from benchmarks.plan import COLUMNS, main


def test_it_plans_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = {"RANKS": (1,), "WIDTHS": (64,), "LAYERS": (1, 2), "RECOMPUTE": (1,), "SIDE": 16}
    for name, value in smallest.items():
        monkeypatch.setattr(plan, name, value)
    out = tmp_path / "plan.json"
    main([f"--out={out}"])
    few, more = json.loads(out.read_text())["rows"]
    assert tuple(few) == COLUMNS
    assert few["measured_mib"] < more["measured_mib"]
    assert 0.8 < few["ratio"] < 1.25
    assert f"| 1 | 64 | 2 | 1 | {more['planned_mib']:.1f} |" in capsys.readouterr().out
