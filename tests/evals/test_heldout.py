from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.evals import digits
from tests.evals.conftest import Real
from tests.helpers import spawn
from twinflow_train.batch import Condition
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.evals import heldout
from twinflow_train.evals.heldout import heldout_loss

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def loss(world: World, folder: Path, batch: int) -> dict[str, float]:
    shards = ShardSet(folder)
    return heldout_loss(digits.Linear.make(3), shards, world, samples=31, batch=batch, seed=1)


def test_a_velocity_of_zero_is_wrong_by_the_size_of_noise_minus_data(real: Real) -> None:
    def zero(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        return torch.zeros_like(x_t)

    found = heldout_loss(zero, real.heldout, ALONE, samples=240, batch=60, seed=0)
    data = torch.stack([real.heldout.read(i).image for i in range(240)])
    assert list(found) == ["heldout/diagonal", "heldout/jump"]
    for value in found.values():
        assert value == pytest.approx(1 + float(data.square().mean()), rel=0.02)


def test_it_asks_at_fixed_times_for_fixed_samples(real: Real) -> None:
    asked: dict[tuple[float, float], int] = {}

    def spy(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        assert not torch.is_grad_enabled()
        for pair in zip(t.tolist(), r.tolist(), strict=True):
            asked[pair] = asked.get(pair, 0) + 1
        return x_t

    heldout_loss(spy, real.heldout, ALONE, samples=12, batch=5, seed=0)
    assert asked == {(0.25, 0.25): 2, (0.5, 0.5): 2, (0.75, 0.75): 2, (1.0, 0.0): 6}


def test_every_class_is_asked_at_every_time_where_classes_take_turns() -> None:
    t, _ = heldout._times(list(range(180)))
    pairs = {(row % 10, time) for row, time in enumerate(t.tolist())}
    assert len(pairs) == 10 * 4


def test_it_is_zero_for_a_velocity_that_knows_the_pair(real: Real) -> None:
    """On the far jump x_t is the noise itself, so knowing the data is knowing the answer."""
    data = iter([real.heldout.read(i).image for i in range(6)])

    def oracle(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        clean = torch.stack([next(data) for _ in range(len(x_t))])
        return (x_t - clean) / t.view(-1, 1, 1, 1)

    found = heldout_loss(oracle, real.heldout, ALONE, samples=6, batch=4, seed=0)
    assert max(found.values()) < 1e-10


def test_neither_batch_nor_repetition_changes_it_and_the_seed_does(real: Real) -> None:
    first = loss(ALONE, real.heldout.folder, 31)
    assert loss(ALONE, real.heldout.folder, 31) == first
    assert loss(ALONE, real.heldout.folder, 4) == pytest.approx(first, rel=1e-6)
    other = heldout_loss(digits.Linear.make(3), real.heldout, ALONE, samples=31, batch=31, seed=2)
    assert other["heldout/jump"] != first["heldout/jump"]


def test_two_ranks_find_the_same_loss_as_one(real: Real) -> None:
    alone = loss(ALONE, real.heldout.folder, 8)
    first, second = spawn(loss, 2, real.heldout.folder, 8)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
