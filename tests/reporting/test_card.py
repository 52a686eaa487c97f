"""The card says what the run's own files say, and the settings come back as they went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinflow_train.flow.sampler import FEW, Style
from twinflow_train.reporting import card

MANIFEST: dict[str, Any] = {
    "twinflow_train": "1.2.3",
    "commit": None,
    "data": {"encoder": "an encoder", "null_prompt": "a | null", "licence": "CC-BY"},
    "config": {
        "name": "a_run",
        "seed": 3,
        "batch": 32,
        "init_from": None,
        "model": {"_type": "QwenImage", "layers": 60},
        "data": {"path": "shards"},
        "optim": {"_type": "AdamW", "lr": 1e-5},
        "objective": {"_type": "TwinFlow", "shares": {"_type": "Shares", "fake": 1.0}, "x": True},
    },
}
SUMMARY = {
    "results": [
        {"model": "base", "nfe": 100, "frechet": 5.0},
        {"model": "raw", "nfe": 1, "frechet": 7.0},
        {"model": "ema", "nfe": 1, "frechet": 6.0},
    ]
}


def text(folder: Path, kind: str, summary: dict[str, Any]) -> str:
    card.write(folder, manifest=MANIFEST, kind=kind, step=1500, samples=48000, summary=summary)
    return (folder / card.CARD).read_text()


def test_a_card_names_data_steps_objective_and_a_licence_to_fill_in(tmp_path: Path) -> None:
    said = text(tmp_path / "new", "average", SUMMARY)
    head = said.split("---")[1]
    assert 'license: "FILL IN' in head
    for fact in (
        "# a_run", "averaged weights after 1,500 steps on 48,000 samples", "random weights",
        "encoder of the data: an encoder", "null prompt of the data: a | null", "CC-BY",
        "lr 1e-05", "shares (fake 1.0), x true",
        "TwinFlow Train 1.2.3", "seed 3",
    ):  # fmt: skip
        assert fact in said, fact


def test_results_are_those_of_the_weights_and_of_the_base(tmp_path: Path) -> None:
    averaged, raw = (text(tmp_path, kind, SUMMARY) for kind in ("average", "model"))
    assert "| ema" in averaged
    assert "| raw" not in averaged
    assert "| raw" in raw
    assert "| base" in raw
    assert "Results" not in text(tmp_path, "model", {})


def test_sampler_settings_travel_with_the_weights(tmp_path: Path) -> None:
    text(tmp_path, "model", {})
    found = card.read_samplers(tmp_path)
    assert found == list(FEW.values())
    assert [(s.steps, s.style, s.nfe) for s in found] == [
        (1, Style.few, 1), (2, Style.few, 2), (4, Style.few, 4),
    ]  # fmt: skip
