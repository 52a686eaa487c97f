"""The benchmark of growth measures, writes and draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import growth
from benchmarks.growth import NAMES, main


def test_it_measures_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in {"BATCHES": (4,), "SIDES": (8, 16), "RANKS": (2,), "SIDE": 8}.items():
        monkeypatch.setattr(growth, name, values)
    out, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    main(["--width=32", "--rounds=1", f"--out={out}", f"--picture={picture}"])
    found = json.loads(out.read_text())
    assert all(row["seconds"] > 0 for name in NAMES for row in found[name])
    # As many tokens of pictures as four times the area, beside as many of texts.
    few, many = (row["gflop"] for row in found["tokens"])
    assert 1 < many / few < 4
    assert Image.open(picture).width > 1000
    assert "| ranks |" in capsys.readouterr().out
