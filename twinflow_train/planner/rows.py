"""What an optimizer step costs, counted by running the objective on networks that only count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twinflow_train.batch import Batch, Condition, Times
from twinflow_train.deal import Deal
from twinflow_train.objectives.twinflow import TwinFlow


@dataclass(kw_only=True)
class Cost:
    """Sample passes without gradient and network calls, of one rank in one optimizer step.

    fillers: those of the passes that are made only so that all ranks call alike. followed: those of
    the calls that a teacher of its own gets.
    """

    passes: int = 0
    fillers: int = 0
    calls: int = 0
    followed: int = 0


def rows_by_pass(objective: TwinFlow, deal: Deal, *, seed: int, step: int = 0) -> dict[str, int]:
    """Count the sample passes that `deal.rank` needs in an optimizer step, by what they are for.

    student: those with gradient. The others are without: see `TwinFlow.table`.
    """
    needs = objective.table(deal.batch, seed=seed, step=step).needs
    mine = torch.cat([deal.mine(micro) for micro in range(deal.micro_steps)])
    weight = passes_per_row(objective)
    return {"student": len(mine)} | {
        name: times * int(needs[name][mine].sum()) for name, times in weight.items()
    }


def passes_per_row(objective: TwinFlow) -> dict[str, int]:
    """Say how many passes a row takes that needs a kind of them."""
    return {"generate": 1, "guide": 2, "recurse": objective.order, "rectify": 2}


class _Counter:
    """A velocity that is zero and counts the rows asked for in each call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        self.rows.append(len(x_t))
        return torch.zeros_like(x_t)


def cost(objective: TwinFlow, deal: Deal, *, seed: int, step: int = 0) -> Cost:
    """Count what `deal.rank` does in an optimizer step; the gradient passes count as calls only."""
    student = _Counter()
    teacher = student if objective.teacher_decay == 0 else _Counter()
    for micro in range(deal.micro_steps):
        draws = objective.draw(deal, micro, seed=seed, step=step, latent=(1,))
        rows = len(draws.t)
        text = Condition(tokens=torch.zeros(rows, 1, 1))
        batch = Batch(data=torch.zeros(rows, 1), cond=text, null=text[:1], keys=("",) * rows)
        objective.loss(student, teacher, batch, draws)
    followed = [] if teacher is student else teacher.rows
    asked = student.rows + followed
    passes = sum(asked) - deal.batch // deal.ranks
    wanted = rows_by_pass(objective, deal, seed=seed, step=step)
    needed = sum(wanted.values()) - wanted["student"]
    return Cost(passes=passes, fillers=passes - needed, calls=len(asked), followed=len(followed))
