"""Experiments on released models hold the published settings (paper, table of hyperparameters)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_run import composed
from twinflow_train.models.base import Model
from twinflow_train.models.openuni import OpenUni
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.sana import Sana, sana_600m
from twinflow_train.models.sd3 import SD3
from twinflow_train.models.z_image import ZImage

PUBLISHED: dict[str, tuple[Model, dict[str, Any]]] = {
    "qwen_image_full": (
        QwenImage(),
        {"optim": "AdamW", "lr": 1e-5, "betas": [0.9, 0.99], "clip": 1, "batch": 32},
    ),
    "sana_0.6b_full": (
        sana_600m(),
        {"optim": "RAdam", "lr": 1e-4, "betas": [0.9, 0.95], "clip": 0, "batch": 128,
         "steps": 30000},
    ),
    "sana_1.6b_full": (
        Sana(),
        {"optim": "RAdam", "lr": 1e-4, "betas": [0.9, 0.99], "clip": 0, "batch": 128,
         "steps": 30000},
    ),
    "openuni_l_full": (
        OpenUni(freeze_connector=True),
        {"optim": "AdamW", "lr": 1e-4, "betas": [0.9, 0.95], "clip": 1, "batch": 128,
         "steps": 60000},
    ),
    "sd35_medium_full": (
        SD3(),
        {"optim": "AdamW", "lr": 1e-5, "betas": [0.9, 0.99], "clip": 1, "batch": 128},
    ),
    "z_image_full": (
        ZImage(),
        {"optim": "AdamW", "lr": 1e-5, "betas": [0.9, 0.99], "clip": 1, "batch": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_experiments_hold_the_published_settings(name: str) -> None:
    model, settings = PUBLISHED[name]
    run = composed(f"experiment={name}")
    assert (run.name, run.model) == (name, model)
    found = {"optim": type(run.optim).__name__, "batch": run.batch, "steps": run.steps}
    found |= {key: vars(run.optim)[key] for key in ("lr", "betas", "clip", "weight_decay")}
    assert found | settings | {"weight_decay": 0.0} == found
    objective = run.objective
    decay, rectify = (0.999, 0.75) if name == "openuni_l_full" else (0.99, 0.5)
    assert (objective.teacher_decay, objective.rectify_weight) == (decay, rectify)
    assert objective.guidance == 0.8
    assert (objective.order, objective.consistency_ratio) == (2, 1)
    assert run.init_from is not None
    counts = objective.shares.counts(run.batch)
    quarter = run.batch // 4
    assert {role: n for role, n in counts.items() if n} == dict.fromkeys(
        ("generator", "local", "jump", "fake"), quarter
    )
