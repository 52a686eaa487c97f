"""The learning-rate schedule, what is refused, and an optimizer that is whole from step 0."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinflow_train.engines.optim import MOMENTS, AdamW, set_updates


def rates(steps: int, **settings: float) -> list[float]:
    optim = AdamW(lr=2.0, **settings)  # type: ignore[arg-type]
    return [optim.rate(step, steps) for step in range(steps)]


def test_without_settings_the_rate_is_constant() -> None:
    assert rates(5) == [2.0] * 5


def test_the_rate_warms_up_from_above_zero_to_full() -> None:
    assert rates(6, warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_rate_stays_and_then_falls_along_half_a_cosine() -> None:
    found = rates(10, constant=0.4, lr_end=0.1)
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert found == pytest.approx([2.0] * 4 + [2 * share for share in fall])
    assert AdamW(lr=2.0, constant=0.4, lr_end=0.1).rate(10, 10) == pytest.approx(0.2)
    assert AdamW(lr=2.0, constant=0.4).rate(7, 10) == pytest.approx(1.0)


def test_the_fall_begins_after_the_warmup_at_the_earliest() -> None:
    found = rates(8, warmup=4, constant=0.0)
    assert found[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert all(a > b > 0 for a, b in pairwise(found[4:]))


def test_a_warmup_longer_than_the_run_still_gives_every_step_a_rate() -> None:
    assert rates(3, warmup=6, constant=0.5) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0; it must be positive"),
        ({"lr": math.nan}, "optim.lr is nan; it must be positive"),
        ({"lr": math.inf}, "optim.lr is inf; it must be positive"),
        ({"betas": [0.9]}, r"optim.betas is \[0.9\]; it must be two"),
        ({"betas": [0.9, 1.0]}, r"optim.betas is \[0.9, 1.0\]; it must be two"),
        ({"eps": -1e-8}, "optim.eps is -1e-08; it must be 0 or more"),
        ({"weight_decay": -0.1}, "optim.weight_decay is -0.1; it must be 0 or more"),
        ({"clip": math.nan}, "optim.clip is nan; it must be 0 or more"),
        ({"warmup": -1}, "optim.warmup is -1; it must be 0 or more"),
        ({"lr_end": -0.5}, "optim.lr_end is -0.5; it must be 0 or more"),
        ({"constant": 1.5}, r"optim.constant is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_a_bad_value_is_refused_by_key_and_number(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AdamW(**settings)


def test_the_optimizer_gets_every_setting() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optim = AdamW(lr=0.5, betas=[0.7, 0.8], eps=1e-3, weight_decay=0.2)
    (group,) = optim.build([parameter]).param_groups
    found = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert found == {"lr": 0.5, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2}


def gradient(step: int) -> Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(step))


def run(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        parameter.grad = gradient(step)
        optimizer.step()


def test_moments_begun_early_change_no_update() -> None:
    ours, theirs = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optim = AdamW(lr=0.1, weight_decay=0.01)
    early = optim.build([ours])
    assert set(early.state[ours]) == {"step", *MOMENTS}
    assert all(early.state[ours][name].count_nonzero() == 0 for name in MOMENTS)
    run(ours, early, range(4))
    run(theirs, optim.build([theirs]), range(4))
    assert torch.equal(ours, theirs)


def test_a_restored_optimizer_goes_on_where_it_was() -> None:
    through = nn.Parameter(torch.ones(3, 2))
    optim = AdamW(lr=0.1)
    first = optim.build([through])
    run(through, first, range(3))
    resumed = nn.Parameter(through.detach().clone())
    second = optim.build([resumed])
    for name in MOMENTS:
        second.state[resumed][name].copy_(first.state[through][name])
    set_updates(second, 3)
    run(through, first, range(3, 6))
    run(resumed, second, range(3, 6))
    assert torch.equal(through, resumed)
