"""Is the game of one network against itself in order? Asked of the networks on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinflow_train.batch import Condition, Velocity
from twinflow_train.data.sample import condition_of
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.evals.deal import Deal
from twinflow_train.flow.path import interpolate, jump
from twinflow_train.rng import generator

SAMPLES, BATCH = 96, 48
NAMES = ("teacher_distance", "two_step_gap", "noise_floor")


@dataclass(kw_only=True)
class Health:
    """Who is asked: the student and its teacher; delta and order of the recursion; compute type."""

    student: Velocity
    teacher: Velocity
    delta: float
    order: int
    dtype: torch.dtype

    def measure(self, heldout: ShardSet, world: World, *, seed: int = 0) -> dict[str, float]:
        """Return the measures; they depend neither on ranks nor on batches. Collective.

        Where held-out samples are prompts alone, what the student makes of them in one step stands
        for their images.

        health/teacher_distance: root mean square of student minus teacher on the diagonal, relative
        to the teacher's. Absent where the teacher is the student, or says 0 everywhere.
        health/two_step_gap: the same of F(z, 1, 0)'s sample minus that of two half jumps, relative
        to the latter.
        health/noise_floor: an estimate of what rounding alone puts into the recursion's residual at
        (t, r) = (1, 0), a root mean square to be compared with the clamp at 1: the difference of
        two residuals whose inputs differ by less than the compute type can tell, over sqrt(2).
        Absent without a recursion.
        """
        deal = Deal(count=SAMPLES, world=world)
        parts = [self._squares(heldout, world, rows, seed=seed) for rows in deal.chunks(BATCH)]
        squares = deal.collect(torch.cat(parts)).double().mean(0).cpu()
        over, under = squares[:3].sqrt(), squares[3:].sqrt()
        found = zip(NAMES, (over / under).tolist(), under.tolist(), strict=True)
        values = {f"health/{name}": value for name, value, asked in found if asked}
        if self.teacher is self.student:
            values.pop("health/teacher_distance", None)
        return values

    @torch.no_grad()
    def _squares(self, heldout: ShardSet, world: World, rows: list[int], *, seed: int) -> Tensor:
        """Return each row's mean squares, numerators and then denominators, (rows, 6)."""
        found = [heldout.read(row % len(heldout)) for row in rows]
        cond = condition_of(found).to(world.device)
        z = _draw("health", heldout.latent_shape, rows, seed).to(world.device)
        # The student's passes are one call each: every rank makes them alike.
        one = torch.ones(len(rows), device=world.device)
        F = self.student(z, one, 0 * one, cond)
        data = jump(z, F, one, 0 * one)
        if heldout.manifest.form.has_latents:
            data = torch.stack([sample.image.float() for sample in found]).to(world.device)
        t = (torch.tensor(rows) % 8 + 0.5).to(one) / 8
        x_t = interpolate(data, z, t)
        apart = self.student(x_t, t, t, cond)
        towards = self.teacher(x_t, t, t, cond)
        half = jump(z, self.student(z, one, one / 2, cond), one, one / 2)
        two = jump(half, self.student(half, one / 2, 0 * one, cond), one / 2, 0 * one)
        unit = torch.finfo(self.dtype).eps / 2
        moved = z * (1 + unit * _draw("health-unit", z.shape[1:], rows, seed).clamp(-1, 1).to(z))
        noise = self._residual(moved, z - data, cond) - self._residual(z, z - data, cond)
        floor = torch.full_like(z, 2**0.5 if self.order else 0)
        pairs = [apart - towards, jump(z, F, one, 0 * one) - two, noise, towards, two, floor]
        return torch.stack([p.float().square().flatten(1).mean(1) for p in pairs], dim=1)

    def _residual(self, x: Tensor, v: Tensor, cond: Condition) -> Tensor:
        """Return the recursion's residual at (1, 0), but for v, whose jumps the student makes."""
        one = torch.ones(len(x), device=x.device)
        F = self.student(x, one, 0 * one, cond)
        x = x - self.delta * v
        for k in range(self.order):
            now, then = ((1 - self.delta) * (1 - i / self.order) * one for i in (k, k + 1))
            step = self.student(x, now, then, cond)
            F = F - (now - then)[:, None, None, None] * step
            x = jump(x, step, now, then)
        return F / self.delta


def _draw(purpose: str, shape: Sequence[int], rows: list[int], seed: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator(purpose, seed, i)) for i in rows])
