from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from twinflow_train.errors import UserError
from twinflow_train.evals.results import Evaluation, Result, short_name
from twinflow_train.flow.sampler import Sampler, Style


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (Sampler(), "nfe1"),
        (Sampler(steps=2, stochasticity=1.0), "nfe2-s1"),
        (Sampler(steps=4, style=Style.any), "nfe4-any"),
        (Sampler(steps=30, style=Style.multi), "nfe30-multi"),
        (Sampler(steps=30, style=Style.multi, guidance=2.0), "nfe60-multi-g2"),
        (Sampler(steps=8, style=Style.multi, sde=True), "nfe8-multi-sde"),
        (Sampler(steps=4, extrapolation=0.5), "nfe4-q0.5"),
    ],
)
def test_names_say_what_is_not_plain(sampler: Sampler, name: str) -> None:
    assert short_name(sampler) == name


def evaluation(model: str = "ema", caption: str = "a handwritten one") -> Evaluation:
    samplers = [Sampler(), Sampler(steps=2, stochasticity=1.0)]
    results = [Result.of(model, s, {"accuracy": 0.9, "frechet": 1 / 3}) for s in samplers]
    return Evaluation(
        results=results,
        real={"accuracy": 0.99},
        captions=[caption],
        reals=torch.zeros(1, 1, 2, 2),
        pictures={result.key: torch.ones(1, 1, 2, 2) for result in results},
    )


def test_metric_names_are_unique_and_readable() -> None:
    assert list(evaluation().metrics()) == [
        "eval/ema/nfe1/accuracy",
        "eval/ema/nfe1/frechet",
        "eval/ema/nfe2-s1/accuracy",
        "eval/ema/nfe2-s1/frechet",
    ]


def test_the_summary_has_flat_rows_without_absent_scores() -> None:
    summary = json.loads(json.dumps(evaluation().summary(), allow_nan=False))
    row = summary["results"][0]
    assert row["model"] == "ema"
    assert row["nfe"] == 1
    assert row["style"] == "few"
    assert row["accuracy"] == 0.9
    assert "diversity" not in row
    assert summary["real"] == {"accuracy": 0.99}


def test_what_is_saved_comes_back_equal(tmp_path: Path) -> None:
    saved = evaluation()
    saved.results[0].scores["frechet"] = math.nan
    saved.save(tmp_path / "new" / "base")
    loaded = Evaluation.load(tmp_path / "new" / "base")
    assert math.isnan(loaded.results[0].scores.pop("frechet"))
    del saved.results[0].scores["frechet"]
    assert loaded.results == saved.results
    assert (loaded.captions, loaded.real) == (saved.captions, saved.real)
    assert loaded.reals is not None
    assert all(torch.equal(loaded.pictures[k], v) for k, v in saved.pictures.items())
    assert len(list((tmp_path / "new" / "base").iterdir())) == 2


def test_an_empty_evaluation_can_be_kept_too(tmp_path: Path) -> None:
    Evaluation().save(tmp_path)
    assert Evaluation.load(tmp_path) == Evaluation()
    assert Evaluation().columns() == []


def test_what_is_missing_or_broken_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no evaluation"):
        Evaluation.load(tmp_path)
    evaluation().save(tmp_path)
    (tmp_path / "pictures.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not a whole evaluation"):
        Evaluation.load(tmp_path)


def test_the_base_stands_before_the_network_in_training() -> None:
    both = evaluation("base") + evaluation("ema")
    assert [result.model for result in both.results] == ["base"] * 2 + ["ema"] * 2
    assert len(both.columns()) == 5
    assert (evaluation("base") + Evaluation()).columns()[1].heading == "base\n1 NFE\n"


def test_pictures_of_other_prompts_are_not_shown_beside_each_other() -> None:
    both = evaluation("base", "a handwritten two") + evaluation("ema")
    assert len(both.results) == 4
    assert [column.heading.split("\n")[0] for column in both.columns()] == ["real", "ema", "ema"]
    assert both.captions == ["a handwritten one"]
