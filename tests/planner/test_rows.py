"""What a step costs, against the figures of the method."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twinflow_train.deal import Deal
from twinflow_train.objectives import presets
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner import Cost, cost

B = 64


def spent(objective: TwinFlow, *, ranks: int = 1, rank: int = 0, micro: int = B) -> Cost:
    deal = Deal(batch=B, micro_batch=micro // ranks, ranks=ranks, rank=rank)
    return cost(objective, deal, seed=0)


def test_an_averaged_teacher_costs_at_most_the_published_passes() -> None:
    found = spent(TwinFlow())
    assert found.passes <= 3.25 * B
    assert found.calls <= 6
    assert found.fillers == 0


def test_a_teacher_that_is_the_student_shares_calls() -> None:
    found = spent(TwinFlow(teacher_decay=0.0))
    assert found.passes <= 3.25 * B
    assert found.calls <= 4


def test_flow_matching_costs_one_call_and_nothing_else() -> None:
    assert spent(presets.flow_matching()) == Cost(passes=0, fillers=0, calls=1)


def test_each_part_of_the_objective_costs_its_passes() -> None:
    """Quarters: 16 rows a role. Guidance asks twice, each jump once, rectification twice."""
    bare = TwinFlow(shares=Shares(generator=0, local=0, fake=0), guidance=0.0, rectify_weight=0.0)
    jumps = spent(replace(bare, order=1)).passes
    assert 0.9 * B < jumps <= B  # rows with t - r < delta need none
    assert spent(replace(bare, order=3)).passes == 3 * jumps
    guided = spent(replace(bare, order=1, guidance=0.5))
    assert guided.passes == jumps + 2 * B
    ours = TwinFlow()
    assert spent(ours).passes - spent(replace(ours, rectify_weight=0.0)).passes == 2 * B // 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_passes_and_call_alike(ranks: int) -> None:
    alone = spent(TwinFlow())
    each = [spent(TwinFlow(), ranks=ranks, rank=rank) for rank in range(ranks)]
    assert sum(one.passes - one.fillers for one in each) == alone.passes
    assert len({one.calls for one in each}) == 1
    assert max(one.passes for one in each) <= 1.1 * alone.passes / ranks
    assert sum(one.fillers for one in each) <= 0.1 * alone.passes


def test_micro_steps_repeat_the_calls() -> None:
    whole, halves = spent(TwinFlow()), spent(TwinFlow(), micro=B // 2)
    assert halves.passes - halves.fillers == whole.passes - whole.fillers
    assert halves.calls <= 2 * whole.calls


def test_a_plan_is_of_its_seed_and_step() -> None:
    deal = Deal(batch=B, micro_batch=B, ranks=1, rank=0)
    assert cost(TwinFlow(), deal, seed=3, step=5) == cost(TwinFlow(), deal, seed=3, step=5)
