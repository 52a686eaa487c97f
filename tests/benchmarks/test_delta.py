"""The study of delta reads from a run what its table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.delta import DELTAS, LAST, PRECISIONS, main, row, settings, table
from twinflow_train.metrics import FILE


def write(run: Path) -> Path:
    run.mkdir()
    lines: list[dict[str, float]] = [{"step": 0, "health/noise_floor": 9.0}]
    lines += [{"step": k, "residual/clamped": float(k >= 100)} for k in range(100 + LAST)]
    lines += [{"step": 200, "health/noise_floor": 0.25}]
    (run / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"nfe": 1, "accuracy": 0.875, "frechet": 4.0, "diversity": 0.5}
    results = [{"model": "raw", **scores, "accuracy": 0.1}, {"model": "ema", **scores}]
    (run / "summary.json").write_text(json.dumps({"results": results}))
    return run


def test_a_row_is_the_end_of_a_run(tmp_path: Path) -> None:
    found = row(write(tmp_path / "run"), "0.01", "bf16")
    assert found == {
        "delta": "0.01", "precision": "bf16", "noise_floor": 0.25, "clamped": 1.0,
        "accuracy": 0.875, "frechet": 4.0, "diversity": 0.5,
    }  # fmt: skip
    assert table({"runs": [found]}).splitlines()[-1] == (
        "| bf16 | 0.01 | 0.25 | 1.000 | 0.875 | 4.00 | 0.50 |"
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_runs_differ_only_in_delta_and_precision(precision: str) -> None:
    first, *others = (settings(delta, precision, 200, 1000) for delta in DELTAS)
    for delta, other in zip(DELTAS[1:], others, strict=True):
        changed = {word for word in other if word not in first}
        assert changed == {f"objective.delta={delta}", f"name={precision}-{delta}"}


def test_a_run_of_other_settings_is_not_taken_for_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "fp32-0.1", tmp_path / "out.json"
    folder.mkdir()
    kept = {"words": settings("0.1", "fp32", 7, 20), "cpu_seconds": 1.0, "commit": None}
    scores = {"noise_floor": 1.0, "clamped": 0.5, "accuracy": 1.0, "frechet": 2.0, "diversity": 1.0}
    (folder / "scores.json").write_text(
        json.dumps(kept | {"delta": "0.1", "precision": "fp32"} | scores)
    )
    only = ["--delta=0.1", "--precision=fp32", "--images=20", f"--folder={tmp_path}"]
    assert main([*only, "--steps=7", f"--out={out}"]) == 0
    assert "| fp32 | 0.1 | 1 | 0.500 |" in capsys.readouterr().out
    assert main([*only, "--steps=8", f"--out={out}"]) == 2
    assert "made with other settings" in capsys.readouterr().err
