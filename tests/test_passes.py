"""Passes: what shares a call, what a step costs, and that every rank calls alike."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.objectives.toys import (
    Counting,
    count_calls,
    gradients,
    network,
    normal,
    toy_batch,
    whole,
)
from twinflow_train.batch import Condition, Times, Velocity
from twinflow_train.deal import Deal
from twinflow_train.objectives.presets import (
    flow_matching,
    rcgm,
    twinflow_image_free,
    twinflow_lora_order1,
    twinflow_paper,
)
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.passes import Pass, run
from twinflow_train.planner import cost


def told(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
    """Be a velocity in which every argument of a row can be read off."""
    return x_t + 10 * t[:, None] + 100 * r[:, None] + cond.tokens.sum((1, 2))[:, None]


def a_pass(name: str, net: Velocity, rows: int, *, tokens: int = 1) -> Pass:
    t, r = normal(name + "t", rows).abs(), normal(name + "r", rows).abs()
    cond = Condition(tokens=normal(name + "c", rows, tokens, 2))
    return Pass(name=name, network=net, x_t=normal(name, rows, 3), t=t, r=r, cond=cond)


def alone(p: Pass) -> Tensor:
    return told(p.x_t, p.t, p.r, p.cond)


def test_passes_of_one_network_share_a_call_and_get_their_own_rows_back() -> None:
    log: list[tuple[str, int, bool]] = []
    net, other = Counting("net", told, log), Counting("other", told, log)
    passes = [
        a_pass("a", net, 2, tokens=3),
        a_pass("b", other, 1),
        a_pass("c", net, 3, tokens=1),
    ]
    found = run(frozenset("abc"), *passes, filler=a_pass("", net, 1))
    for F, p in zip(found, passes, strict=True):
        torch.testing.assert_close(F, alone(p))
    assert log == [("net", 5, False), ("other", 1, False)]


def test_a_pass_that_no_rank_needs_is_not_made() -> None:
    log: list[tuple[str, int, bool]] = []
    net, other = Counting("net", told, log), Counting("other", told, log)
    passes = [a_pass("a", net, 0), a_pass("b", other, 2), a_pass("c", net, 0)]
    found = run(frozenset("b"), *passes, filler=a_pass("", net, 1))
    assert [len(F) for F in found] == [0, 2, 0]
    assert log == [("other", 2, False)]


def test_a_rank_without_rows_calls_all_the_same_with_the_fillers_row() -> None:
    log: list[tuple[str, int, bool]] = []
    net, other = Counting("net", told, log), Counting("other", told, log)
    passes = [a_pass("a", net, 0), a_pass("b", other, 0), a_pass("c", other, 2)]
    found = run(frozenset("ac"), *passes, filler=a_pass("", other, 1))
    assert [len(F) for F in found] == [0, 0, 2]
    assert log == [("net", 1, False), ("other", 2, False)]


def test_passes_take_no_gradient() -> None:
    net = network()
    batch = toy_batch(2)
    t = torch.ones(2, dtype=torch.float64)
    p = Pass(name="a", network=net, x_t=batch.data, t=t, r=t, cond=batch.cond)
    (F,) = run(frozenset("a"), p, filler=p)
    assert not F.requires_grad


LIMITS = {  # no-grad sample passes per sample, network calls
    "ema": (TwinFlow(), 3.25, 6),
    "self": (TwinFlow(teacher_decay=0.0), 3.25, 4),
}


def forwards(log: list[tuple[str, int, bool]]) -> int:
    return sum(rows for _, rows, grad in log if not grad)


@pytest.mark.parametrize("teacher", LIMITS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_costs_no_more_than_promised(teacher: str, ranks: int) -> None:
    objective, passes, calls = LIMITS[teacher]
    for step in range(3):
        for rank in range(ranks):
            deal = Deal(batch=16, micro_batch=16 // ranks, ranks=ranks, rank=rank)
            log = count_calls(objective, toy_batch(16), deal)
            assert forwards(log) <= passes * deal.batch / ranks
            assert len(log) <= calls
            assert [grad for _, _, grad in log].count(True) == 1
            planned = cost(objective, deal, seed=7, step=step)
            assert planned.fillers == 0
            assert planned.calls == len(log)


def test_only_rows_that_need_a_pass_get_it() -> None:
    # At most 1/4 generated, 2/4 guided twice, 3/4 recursed twice, 1/4 rectified twice.
    log = count_calls(TwinFlow(), toy_batch(400), Deal(batch=400, micro_batch=400, ranks=1, rank=0))
    t, r = (getattr(TwinFlow().table(400, seed=7, step=3), name) for name in "tr")
    near = int((t[:300] - r[:300] < 0.01).sum())
    assert 0 < near < 100
    assert forwards(log) == 100 + 2 * 200 + 2 * (300 - near) + 2 * 100
    narrow = TwinFlow(guidance_low=0.4, guidance_high=0.6)
    inside = int(((t[100:300] > 0.4) & (t[100:300] < 0.6)).sum())
    deal = Deal(batch=400, micro_batch=400, ranks=1, rank=0)
    saved = forwards(log) - forwards(count_calls(narrow, toy_batch(400), deal))
    assert saved == 2 * (200 - inside) > 0


@pytest.mark.parametrize(
    ("objective", "passes", "calls"),
    [
        (flow_matching(), 0, 1),  # nothing but the pass with gradient
        (TwinFlow(shares=Shares(generator=0, local=0, fake=0), rectify_weight=0, guidance=0,
                  order=3), 3, 4),
        (TwinFlow(shares=Shares(local=0, jump=0, fake=0), rectify_weight=0, order=1), 1, 2),
    ],
)  # fmt: skip
def test_what_is_off_costs_nothing(objective: TwinFlow, passes: int, calls: int) -> None:
    log = count_calls(objective, toy_batch(8), Deal(batch=8, micro_batch=8, ranks=1, rank=0))
    assert forwards(log) == passes * 8
    assert len(log) == calls


def test_the_planner_counts_what_is_called_and_names_the_fillers() -> None:
    objective = TwinFlow(shares=Shares(generator=3, local=2, jump=1, fake=2))
    fillers = 0
    for rank in range(2):
        deal = Deal(batch=8, micro_batch=1, ranks=2, rank=rank)
        log = count_calls(objective, toy_batch(8), deal)
        planned = cost(objective, deal, seed=7, step=3)
        assert (planned.passes, planned.calls) == (forwards(log), len(log))
        fillers += planned.fillers
    one = cost(objective, Deal(batch=8, micro_batch=8, ranks=1, rank=0), seed=7, step=3)
    both = sum(
        cost(objective, Deal(batch=8, micro_batch=1, ranks=2, rank=k), seed=7, step=3).passes
        for k in range(2)
    )
    assert one.fillers == 0
    assert fillers == both - one.passes > 0


VARIANTS: dict[str, dict[str, Any]] = {
    "ema": {},
    "self": {"teacher_decay": 0.0},
    "window": {"guidance_low": 0.45, "guidance_high": 0.55},
    "image_free": {"image_free": True, "teacher_decay": 1.0, "guidance": 4.0},
    "image_free_window": {
        "image_free": True,
        "teacher_decay": 1.0,
        "guidance_low": 0.45,
        "guidance_high": 0.55,
    },
    "order1": {"order": 1},
    "order3": {"order": 3, "random_grid": True, "teacher_decay": 0.0},
    "no_rectify": {"rectify_weight": 0.0},
    "near": {"consistency_ratio": 0.02, "teacher_decay": 0.0},
}


@pytest.mark.parametrize("name", VARIANTS)
@given(
    shares=st.lists(st.sampled_from([0, 1, 1, 2, 5]), min_size=5, max_size=5),
    sizes=st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4)),
)
@settings(deadline=None, max_examples=8)
def test_every_rank_calls_the_same_networks_in_the_same_order(
    name: str, shares: list[int], sizes: tuple[int, int, int]
) -> None:
    ranks, micro_batch, accumulation = sizes
    batch = ranks * micro_batch * accumulation
    roles = ("generator", "local", "jump", "direct", "fake")
    split = Shares(**dict(zip(roles, shares, strict=True))) if any(shares) else Shares()
    if not split.generator or not split.fake:  # a fake branch that nothing trains is warned of
        split = replace(split, generator=1, fake=1)
    assume(_deals(split, batch))
    objective = TwinFlow(shares=split, **VARIANTS[name])
    logs = [
        count_calls(
            objective,
            toy_batch(batch),
            Deal(batch=batch, micro_batch=micro_batch, ranks=ranks, rank=rank),
        )
        for rank in range(ranks)
    ]
    called = [[(network, grad) for network, _, grad in log] for log in logs]
    assert all(calls == called[0] for calls in called)
    assert [grad for _, grad in called[0]].count(True) == accumulation


def _deals(shares: Shares, batch: int) -> bool:
    try:
        shares.counts(batch)
    except ValueError:
        return False
    return True


class Behind:
    """The same network as another object, so that no call can be shared with it."""

    def __init__(self, inner: Velocity) -> None:
        self.inner = inner

    def __call__(self, x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return self.inner(x_t, t, r, cond)


@pytest.mark.parametrize(
    "objective",
    [
        TwinFlow(teacher_decay=0.0),
        TwinFlow(teacher_decay=0.0, order=1, shares=Shares(generator=2)),
        replace(twinflow_paper(), teacher_decay=0.0),
        replace(rcgm(), teacher_decay=0.0),
        twinflow_lora_order1(),
        twinflow_image_free(),
    ],
    ids=["twinflow", "order1", "paper", "rcgm", "lora", "image_free"],
)
def test_sharing_calls_changes_nothing(objective: TwinFlow) -> None:
    student, batch = network(), toy_batch(12, nulls=12)
    log: list[tuple[str, int, bool]] = []
    parameters = list(student.parameters())
    draws = whole(objective, 12)
    net = Counting("student", student, log)
    fused = objective.loss(net, net, batch, draws)
    calls = len(log)
    apart = objective.loss(net, Behind(net), batch, draws)
    if objective.teacher_decay == 0:
        assert len(log) - calls > calls or objective.shares.fake == 0
    torch.testing.assert_close(fused.total, apart.total, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        gradients(fused.total, parameters), gradients(apart.total, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))
