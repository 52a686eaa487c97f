from __future__ import annotations

from typing import Any

from twinflow_train.reporting.table import markdown, plain

ROWS: list[dict[str, Any]] = [
    {
        "model": "base", "sampler": "nfe30-multi", "nfe": 30, "steps": 30, "style": "multi",
        "guidance": 1.0, "stochasticity": 0.0, "sde": True,
        "accuracy": 0.854, "frechet": 67.123, "diversity": 1.0, "seconds_per_image": 0.02,
    },
    {
        "model": "ema", "sampler": "nfe1", "nfe": 1, "steps": 1, "style": "few",
        "guidance": 1.0, "stochasticity": 0.0, "sde": False,
        "accuracy": 0.9871, "frechet": None, "diversity": 0.8, "seconds_per_image": 0.00071,
    },
]  # fmt: skip


def test_the_plain_table_is_aligned() -> None:
    assert plain(ROWS, real={"accuracy": 0.99, "frechet": 0.7}).splitlines() == [
        "model  NFE  steps  style  guidance    s  accuracy  Frechet  diversity  s/image",
        "-----  ---  -----  -----  --------  ---  --------  -------  ---------  -------",
        "base    30     30  multi         1  sde     0.854    67.12       1.00   0.0200",
        "ema      1      1  few           1    0     0.987      nan       0.80   0.0007",
        "real                                        0.990     0.70",
    ]


def test_markdown_has_the_same_cells() -> None:
    lines = markdown(ROWS).splitlines()
    assert lines[0].split() == ["|", *" | ".join(plain(ROWS).splitlines()[0].split()).split(), "|"]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("| ----- | --: | ----: | ----- |")
    assert "| 67.12 |" in " ".join(lines[2].split())


def test_scores_that_no_row_has_are_left_out() -> None:
    rows = [{"model": "ema", "nfe": 1, "accuracy": 1}]
    assert plain(rows).splitlines()[0].split() == ["model", "NFE", "accuracy"]
    assert plain([]) == "model\n-----"


def test_a_model_cannot_break_the_table() -> None:
    assert markdown([{"model": "a|b\nc"}]).splitlines()[2] == "| a/b c |"
