"""The card says what the run's own files say, and the settings come back as they went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twinflow_train.flow.sampler import FEW, MANY, Style
from twinflow_train.reporting import card

HOLDS = "`transformer/` holds"
MANIFEST: dict[str, Any] = {
    "twinflow_train": "1.2.3",
    "commit": None,
    "data": [{"encoder": "an encoder", "null_prompt": "a | null", "licence": "CC-BY"}],
    "config": {
        "name": "a_run",
        "seed": 3,
        "batch": 32,
        "init_from": None,
        "model": {"_type": "QwenImage", "layers": 60},
        "data": {"path": "shards"},
        "optim": {"_type": "AdamW", "lr": 1e-5},
        "objective": {
            "_type": "TwinFlow",
            "shares": {"_type": "Shares", "fake": 1.0},
            "order": 2,
            "rectify_weight": 0.5,
            "x": True,
        },
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
    card.write(
        folder,
        manifest=MANIFEST,
        holds=HOLDS,
        kind=kind,
        step=1500,
        samples=48000,
        summary=summary,
    )
    return (folder / card.CARD).read_text()


def test_a_card_names_data_steps_objective_and_a_licence_to_fill_in(tmp_path: Path) -> None:
    said = text(tmp_path / "new", "average", SUMMARY)
    head = said.split("---")[1]
    assert 'license: "FILL IN' in head
    for fact in (
        "# a_run", "averaged weights after 1,500 steps on 48,000 samples", "random weights",
        "encoder of the data: an encoder", "null prompt of the data: a | null", "CC-BY",
        "lr 1e-05", "shares (fake 1.0), order 2, rectify_weight 0.5, x true", "one, two or four",
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


def test_a_flow_matching_base_is_not_called_a_few_step_model(tmp_path: Path) -> None:
    objective = {"_type": "TwinFlow", "order": 0, "rectify_weight": 0.0}
    manifest = MANIFEST | {"config": MANIFEST["config"] | {"objective": objective}}
    card.write(
        tmp_path, manifest=manifest, holds=HOLDS, kind="model", step=1, samples=2, summary={}
    )
    said = (tmp_path / card.CARD).read_text()
    assert "many steps" in said
    assert "few-step" not in said
    assert card.read_samplers(tmp_path) == list(MANY.values())


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("outputs/digits_flow/export", "outputs/digits_flow/export"),
        ("/of/one/machine/base", "base"),
        ("s3://my-bucket/shards", "shards"),
        ("../elsewhere/shards", "shards"),
    ],
)
def test_a_card_does_not_say_where_things_lie(tmp_path: Path, place: str, said: str) -> None:
    config = MANIFEST["config"] | {"init_from": place, "data": {"path": place}}
    manifest = MANIFEST | {"config": config}
    card.write(
        tmp_path, manifest=manifest, holds=HOLDS, kind="model", step=1, samples=2, summary={}
    )
    lines = (tmp_path / card.CARD).read_text().splitlines()
    assert f"- start: {said}" in lines
    assert f"- data: {said}" in lines
