"""The picture of runs' health is drawn from what they wrote, whatever is missing or not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from docs.diagnose import PANELS, curves, main, smooth
from twinflow_train.metrics import FILE


def write(run: Path, steps: int, **more: object) -> Path:
    run.mkdir()
    lines = [
        {"step": k, "loss/fake": 1 / (k + 1), "norm/grad": 2.0, "delta_v/cosine": 0.9, **more}
        for k in range(steps)
    ]
    lines.insert(1, {"step": 1, "health/noise_floor": 1e-3})
    (run / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", 80), write(tmp_path / "other", 3, **{"loss/rectify": None})
    out = tmp_path / "picture.png"
    assert main([str(one), str(other), "--out", str(out)]) == 0
    assert main([str(one), "--out", str(tmp_path / "single.png")]) == 0
    double, single = Image.open(out), Image.open(tmp_path / "single.png")
    assert double.height == single.height
    assert double.width > 1.5 * single.width


def test_a_curve_is_averaged_over_parts_and_keeps_its_mean(tmp_path: Path) -> None:
    curve = curves(write(tmp_path / "run", 80))["loss/fake"]
    smoothed = smooth(curve)
    assert len(smoothed) == 40
    assert sum(v for _, v in smoothed) / 40 == pytest.approx(sum(v for _, v in curve) / 80)
    assert [step for step, _ in smoothed][:3] == [0, 2, 4]


def test_every_metric_shown_is_one_that_runs_write() -> None:
    page = Path(__file__, "../../../docs/diagnostics.md").resolve().read_text()
    for names in PANELS.values():
        for name in names:
            assert f"`{name}`" in page, name


def test_a_folder_without_metrics_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert str(tmp_path / FILE) in capsys.readouterr().err
