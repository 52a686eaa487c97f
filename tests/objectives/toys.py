"""Toy batches and networks, and ways to play every rank of a step in one process."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tests.golden.toynet import ConvNet
from tests.objectives.tools import Net
from twinflow_train.batch import Batch, Condition, Times, Velocity
from twinflow_train.deal import Deal
from twinflow_train.draws import Draws
from twinflow_train.objectives.twinflow import Loss, TwinFlow
from twinflow_train.rng import generator

LATENT = (2, 3, 3)


def normal(name: str, *shape: int) -> Tensor:
    """Draw N(0, I) in float64, the same for the same name and shape."""
    return torch.randn(shape, dtype=torch.float64, generator=generator("test", name))


def network(seed: int = 0) -> Net:
    """Build a small convolution in float64 that depends on all four of its arguments."""
    return Net(ConvNet(seed=seed))


def toy_batch(rows: int, *, nulls: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Make a batch of normal data, each row with a condition, and with `nulls` null conditions."""
    return Batch(
        data=normal("data", rows, *LATENT).to(dtype),
        cond=Condition(tokens=normal("cond", rows, 1, 3).to(dtype)),
        null=Condition(tokens=normal("null", nulls, 1, 3).to(dtype)),
        keys=tuple(map(str, range(rows))),
    )


def part_of(batch: Batch, index: Tensor) -> Batch:
    """Select rows, and their null conditions where each row has one."""
    null = batch.null if len(batch.null) == 1 else batch.null[index]
    keys = tuple(batch.keys[i] for i in index.tolist())
    return Batch(data=batch.data[index], cond=batch.cond[index], null=null, keys=keys)


def whole(
    objective: TwinFlow, rows: int, *, step: int = 0, latent: tuple[int, ...] = LATENT
) -> Draws:
    """Draw a global batch that is one micro-batch of one rank."""
    deal = Deal(batch=rows, micro_batch=rows, ranks=1, rank=0)
    return objective.draw(deal, 0, seed=7, step=step, latent=latent)


def at_times(draws: Draws, t: Tensor, r: Tensor, delta: float) -> Draws:
    """Set the times of unguided draws of real rows."""
    rows = (t - r >= delta).nonzero().flatten()
    none = rows[:0]
    calls = frozenset({"recurse"} if len(rows) else {})
    return replace(draws.to("cpu", t.dtype), t=t, r=r, recurse=rows, guide=none, calls=calls)


def step_of_rank(
    objective: TwinFlow,
    networks: tuple[Velocity, Velocity],
    batch: Batch,
    deal: Deal,
    each: Callable[[Loss], None],
) -> None:
    """Compute the losses of one rank's micro-steps."""
    for micro in range(deal.micro_steps):
        draws = objective.draw(deal, micro, seed=7, step=3, latent=tuple(batch.data.shape[1:]))
        each(objective.loss(*networks, part_of(batch, deal.mine(micro)), draws))


def gradients(total: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Differentiate; what the loss does not depend on has gradient 0."""
    found = torch.autograd.grad(total, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


class Counting:
    """A velocity that notes (name, rows, whether it has a gradient) of every call in a log."""

    def __init__(self, name: str, inner: Velocity, log: list[tuple[str, int, bool]]) -> None:
        self.name = name
        self.inner = inner
        self.log = log

    def __call__(self, x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        assert len(x_t) == len(t) == len(r) == len(cond) > 0
        self.log.append((self.name, len(x_t), torch.is_grad_enabled()))
        return self.inner(x_t, t, r, cond)


def nothing(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
    """Be the velocity that is 0 everywhere."""
    return torch.zeros_like(x_t)


def count_calls(objective: TwinFlow, batch: Batch, deal: Deal) -> list[tuple[str, int, bool]]:
    """List the network calls of one rank in one step: (network, rows, with gradient)."""
    log: list[tuple[str, int, bool]] = []
    student = Counting("student", nothing, log)
    teacher = student if objective.teacher_decay == 0 else Counting("teacher", nothing, log)
    step_of_rank(objective, (student, teacher), batch, deal, lambda loss: None)
    return log
