"""Presets and settings: each differs from the default as published, nonsense is refused by name."""

import inspect
import warnings
from dataclasses import fields
from typing import Any

import pytest

from twinflow_train.errors import UserError
from twinflow_train.flow.losses import Distance, l2
from twinflow_train.objectives import presets
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow

THIRD = {"generator": 1, "local": 0, "jump": 4, "direct": 0, "fake": 1}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "flow_matching": {
        "shares": Shares(generator=0, local=1, jump=0, direct=0, fake=0),
        "order": 0,
        "guidance": 0.0,
        "consistency_ratio": 0.0,
        "rectify_weight": 0.0,
    },
    "rcgm": {"shares": Shares(fake=0), "rectify_weight": 0.0},
    "rcgm_pure": {"shares": Shares(generator=0, local=0, fake=0), "rectify_weight": 0.0},
    "twinflow_paper": {
        "shares": Shares(**THIRD),
        "random_grid": True,
        "rectify_weight": 1.0,
        "distance": l2(),
        "time_weight": False,
        "separate_means": True,
    },
    "twinflow_wide": {"delta": 0.1},
    "twinflow_scratch": {
        "shares": Shares(local=2),
        "delta": 0.1,
        "guidance": 0.5,
        "distance": l2(),
    },
    "twinflow_lora_order1": {
        "shares": Shares(jump=0, direct=1),
        "order": 1,
        "guidance": 4.0,
        "teacher_decay": 1.0,
    },
    "twinflow_image_free": {"image_free": True, "guidance": 4.0, "teacher_decay": 1.0},
}


def test_the_default_is_the_reference() -> None:
    default = TwinFlow()
    assert default.shares == Shares(generator=1, local=1, jump=1, direct=0, fake=1)
    assert (default.order, default.delta, default.consistency_ratio) == (2, 0.01, 1.0)
    assert (default.guidance, default.guidance_low, default.guidance_high) == (0.8, 0.0, 1.0)
    assert (default.teacher_decay, default.rectify_weight) == (0.99, 0.5)
    assert (default.time_alpha, default.time_beta) == (1.0, 1.0)
    assert default.distance == Distance(alpha=1.0, c=1e-3)
    assert default.time_weight
    off = (default.random_grid, default.separate_means, default.image_free, default.null_share)
    assert not any(off)


def test_every_preset_is_described() -> None:
    ours = {
        name
        for name, made in inspect.getmembers(presets, inspect.isfunction)
        if made.__module__ == presets.__name__
    }
    assert ours == set(DIFFERENCES)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_preset_differs_as_published_and_nowhere_else(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset, default = getattr(presets, name)(), TwinFlow()
    for setting in fields(TwinFlow):
        ours, usual = (getattr(o, setting.name) for o in (preset, default))
        assert ours == DIFFERENCES[name].get(setting.name, usual), setting.name
        assert (ours != usual) == (setting.name in DIFFERENCES[name]), setting.name


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_preset_deals_a_common_batch(name: str) -> None:
    preset = getattr(presets, name)()
    for batch in (6, 12, 32, 128):
        assert sum(preset.shares.counts(batch).values()) == batch


def test_the_papers_third_is_half_generator_half_fake() -> None:
    counts = presets.twinflow_paper().shares.counts(12)
    assert counts == {"generator": 2, "local": 0, "jump": 8, "direct": 0, "fake": 2}


NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("order", {"order": -1}),
    ("delta", {"delta": 0.0}),
    ("delta", {"delta": 0.6}),
    ("delta", {"delta": float("nan")}),
    ("guidance", {"guidance": -0.1}),
    ("guidance", {"guidance": float("nan")}),
    ("guidance_low", {"guidance_low": -0.1}),
    ("guidance_low", {"guidance_low": 0.5, "guidance_high": 0.5}),
    ("guidance_high", {"guidance_high": 1.1}),
    ("teacher_decay", {"teacher_decay": 1.1}),
    ("teacher_decay", {"teacher_decay": -0.1}),
    ("rectify_weight", {"rectify_weight": -1.0}),
    ("consistency_ratio", {"consistency_ratio": 1.1}),
    ("consistency_ratio", {"consistency_ratio": -0.1}),
    ("time_alpha", {"time_alpha": 0.0}),
    ("time_beta", {"time_beta": -1.0}),
    ("null_share", {"null_share": 1.0}),
    ("null_share", {"null_share": -0.1}),
]
CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("guidance", {"guidance": 1.0}),
    ("guidance", {"guidance": 1.0, "teacher_decay": 0.0}),
    ("image_free", {"image_free": True}),
    ("image_free", {"image_free": True, "teacher_decay": 0.0}),
    ("rectify_weight", {"shares": Shares(generator=0)}),
    ("order", {"order": 0}),
    ("order", {"order": 0, "shares": Shares(jump=0, direct=1)}),
]
# Settings that would silently do nothing, or something that the method does not say.
SILENT: list[tuple[str, dict[str, Any]]] = [
    ("guidance", {"guidance": float("inf"), "teacher_decay": 1.0}),
    ("rectify_weight", {"rectify_weight": float("inf")}),
    ("rectify_weight", {"rectify_weight": 0.0, "separate_means": True}),
    ("rectify_weight", {"rectify_weight": 0.0, "order": 0, "shares": Shares(jump=0)}),
    ("time_alpha", {"time_alpha": float("inf")}),
    ("null_share", {"null_share": 0.1, "shares": Shares(local=0)}),
    ("guidance", {"image_free": True, "guidance": 0.0, "teacher_decay": 1.0}),
]


@pytest.mark.parametrize(("key", "settings"), NONSENSE)
def test_a_value_out_of_range_is_refused_with_key_and_number(
    key: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key} .*{settings[key]}"):
        TwinFlow(**settings)


@pytest.mark.parametrize(("key", "settings"), CONTRADICTIONS)
def test_settings_that_contradict_are_refused_by_name(key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}\b"):
        TwinFlow(**settings)


@pytest.mark.parametrize(("key", "settings"), SILENT)
def test_settings_without_a_meaning_are_refused(key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}\b"):
        TwinFlow(**settings)


@pytest.mark.parametrize("settings", [NONSENSE[0][1], CONTRADICTIONS[0][1]])
def test_a_refusal_is_a_user_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        TwinFlow(**settings)


def test_strong_guidance_is_allowed_from_a_frozen_teacher() -> None:
    assert TwinFlow(guidance=4.0, teacher_decay=1.0).guidance == 4.0


def test_rectification_without_fake_rows_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"objective\.shares\.fake"):
        TwinFlow(shares=Shares(fake=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TwinFlow(shares=Shares(fake=0), rectify_weight=0.0)
        TwinFlow()
