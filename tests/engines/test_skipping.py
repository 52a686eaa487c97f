"""A step that is not to be taken leaves no trace, under either engine and on all ranks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from tests.engines.tools import Trial, batch_of, fingerprint, fsdp2
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.engines.base import Engine, Precision, Sharded
from twinflow_train.engines.zero3 import ZeRO3

ENGINES: dict[str, Engine] = {
    "fsdp2": fsdp2(recompute=1),
    "fsdp2 gathered": fsdp2(reshard=False),
    "zero3": ZeRO3(precision=Precision.fp32, recompute=0),
}
RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Try:
    """What became of a step: the norm it told; whether numbers, and the count of updates, moved."""

    norm: float
    changed: bool
    counted: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank saw: tries by name, and hashes of its state after the same updates."""

    tries: dict[str, Try]
    ends: dict[str, str]
    usual: float


def on_each(world: World) -> dict[str, Found]:
    return {name: one(engine, world) for name, engine in ENGINES.items()}


def one(engine: Engine, world: World) -> Found:
    trial = Trial.of(4, engine=engine)
    plain, ends, tries = trial.shard(world), {}, {}
    trial.learn(plain, 0, world)
    usual = trial.learn(plain, 1, world)[1]
    ends["undisturbed"] = fingerprint(plain)

    sharded = trial.shard(world)
    trial.learn(sharded, 0, world)
    for factor in (math.nan, math.inf):
        spoil(sharded, factor, world)
        tries[f"{factor}"] = attempt(sharded, math.inf)
        spoil(sharded, factor, world)
        tries[f"{factor}, limited"] = attempt(sharded, 1e9)
    for name, limit in (("above", usual / 2), ("never", -1.0)):
        trial.backward(sharded, 1, world)
        tries[name] = attempt(sharded, limit)
    trial.backward(sharded, 1, world)
    tries["below"] = attempt(sharded, usual * 2, rate=trial.optim.rate(1, 6))
    ends["disturbed"] = fingerprint(sharded)
    return Found(tries=tries, ends=ends, usual=usual)


def spoil(sharded: Sharded, factor: float, world: World) -> None:
    """Make a gradient of which rank 0's part is not finite."""
    batch, t = batch_of([world.rank], 1), torch.full((1,), 0.5)
    loss = sharded.student(batch.data, t, t, batch.cond).square().mean()
    sharded.backward(loss * (factor if world.main else 1.0), last=True)


def attempt(sharded: Sharded, limit: float, *, rate: float = RATE) -> Try:
    before, updates = fingerprint(sharded), sharded.updates
    norm = float(sharded.step(rate, limits=(math.inf, limit)).norm)
    return Try(
        norm=norm, changed=fingerprint(sharded) != before, counted=sharded.updates != updates
    )


@cache
def found() -> list[dict[str, Found]]:
    return spawn(on_each, 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("factor", ["nan", "inf", "nan, limited", "inf, limited"])
def test_a_gradient_that_is_not_finite_changes_nothing(engine: str, factor: str) -> None:
    for rank in found():
        told = rank[engine].tries[factor]
        assert not math.isfinite(told.norm)
        assert not told.changed
        assert not told.counted


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("limit", ["above", "never"])
def test_a_norm_above_the_limit_changes_nothing(engine: str, limit: str) -> None:
    for rank in found():
        told = rank[engine].tries[limit]
        assert told.norm == pytest.approx(rank[engine].usual, rel=1e-5)
        assert not told.changed
        assert not told.counted


@pytest.mark.parametrize("engine", ENGINES)
def test_a_norm_below_the_limit_is_taken(engine: str) -> None:
    for rank in found():
        assert rank[engine].tries["below"].changed
        assert rank[engine].tries["below"].counted


@pytest.mark.parametrize("engine", ENGINES)
def test_training_goes_on_as_if_nothing_had_been(engine: str) -> None:
    for rank in found():
        assert rank[engine].ends["disturbed"] == rank[engine].ends["undisturbed"]
