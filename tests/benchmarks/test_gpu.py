"""The benchmark of GPUs runs to its end at toy size, and keeps what it has found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import SECTIONS, TOY, main


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "results" / "gpu.json"
    main(["--toy", f"--out={out}"])
    return out


def test_every_section_measures(found: Path) -> None:
    sections = json.loads(found.read_text())
    assert sections.keys() == SECTIONS.keys()
    for name, section in sections.items():
        assert section["about"]["toy"]
        assert section["rows"]
        for row in section["rows"]:
            if name == "fp8" and "failed" in row:  # torchao is no part of this environment
                assert "pip install" in row["failed"]
                continue
            assert row["seconds"] > 0
            if name != "latency":
                assert row["tflops"] > 0
    assert {row["what"] for row in sections["latency"]["rows"]} == {"1 NFE", "2 NFE", "4 NFE"}
    assert sections["single"]["rows"][0]["what"] == f"{TOY.layers} layers"
    assert all(row["planned_gib"] > 0 for row in sections["memory"]["rows"])


def test_a_section_measured_again_leaves_the_others(
    found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(found.read_text())
    main(["--toy", "--sections", "limit", f"--out={found}"])
    after = json.loads(found.read_text())
    assert after.keys() == before.keys()
    assert after["step"] == before["step"]
    assert after["limit"] != before["limit"]
    assert "| product " in capsys.readouterr().out


def test_full_size_is_not_for_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([f"--out={tmp_path / 'gpu.json'}"])
    assert "--toy" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()
