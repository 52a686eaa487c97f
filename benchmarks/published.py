"""The published TwinFlow training step, written plainly: the baseline that ours is measured by.

Every pass is a call of its own on all rows it could concern, needed or not: 8 calls a step, of
which 7 without gradient run 4.75 samples for each sample of the batch. Roles are the quarters of
the batch: generator, local, jump, fake; times are drawn without stratification.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from twinflow_train.batch import Batch, Velocity
from twinflow_train.flow.losses import Distance
from twinflow_train.flow.path import expand, interpolate
from twinflow_train.flow.times import time_weight
from twinflow_train.rng import generator


@dataclass(kw_only=True)
class PublishedDraws:
    """Everything random in a step: times before the fake rows' sign, and four kinds of noise.

    z_fake has a row for each of the last quarter, z_again and tau one for each of the first.
    """

    t: Tensor
    r: Tensor
    z: Tensor
    z_fake: Tensor
    z_again: Tensor
    tau: Tensor


@dataclass(kw_only=True)
class Published:
    """The published step of order 2 with an averaged or self teacher."""

    distance: Distance = field(default_factory=Distance)
    guidance: float = 0.8
    rectify_weight: float = 0.5
    delta: float = 0.01

    def draw(self, batch: int, *, seed: int, step: int, latent: tuple[int, ...]) -> PublishedDraws:
        """Draw a step's times and noise; `batch` is a multiple of 4."""
        quarter = batch // 4
        draws = generator("published", seed, step)
        t = torch.rand(batch, generator=draws)
        t[:quarter] = 1
        r = t - t * torch.rand(batch, generator=draws)
        near = t - t * 0.05 * torch.rand(batch, generator=draws)
        r[:quarter] = 0
        r[quarter : 2 * quarter] = near[quarter : 2 * quarter]
        r[3 * quarter :] = t[3 * quarter :]
        return PublishedDraws(
            t=t,
            r=r,
            z=torch.randn(batch, *latent, generator=draws),
            z_fake=torch.randn(quarter, *latent, generator=draws),
            z_again=torch.randn(quarter, *latent, generator=draws),
            tau=torch.rand(quarter, generator=draws),
        )

    def loss(
        self, student: Velocity, teacher: Velocity, batch: Batch, draws: PublishedDraws
    ) -> Tensor:
        """Compute L_base + L_adv + rectify_weight L_rectify."""
        quarter = len(batch) // 4
        generators, fakes = slice(0, quarter), slice(3 * quarter, None)
        cond, t, r, z = batch.cond, draws.t, draws.r, draws.z
        at = expand(t, z)
        data = batch.data.clone()

        with torch.no_grad():
            one = torch.ones_like(draws.t[fakes])
            data[fakes] = draws.z_fake - student(draws.z_fake, one, 0 * one, cond[fakes])
            x_t, v = at * z + (1 - at) * data, z - data
            F_cond = teacher(x_t, t, t, cond)
            F_null = teacher(x_t, t, t, batch.null.expand(len(batch)))
            guided = ((t > 0) & (t < 1))[:, None, None, None]
            guided[fakes] = False
            v_star = torch.where(guided, v + self.guidance * (F_cond - F_null), v)

        sign = torch.ones_like(t)
        sign[fakes] = -1
        prediction = student(x_t, sign * t, sign * r, cond)
        F = prediction.detach()

        with torch.no_grad():
            target = F - self._residual(teacher, F, x_t, v_star, batch, draws).clamp(-1, 1)
            target[fakes] = v[fakes]
            x_fake = (x_t - at * F)[generators]
            tau = draws.tau
            x_tau = interpolate(x_fake, draws.z_again, tau)
            F_real = student(x_tau, tau, tau, cond[generators])
            F_fake = student(x_tau, -tau, -tau, cond[generators])
            rectified = F[generators] - (F_fake - F_real).clamp(-1, 1)

        weight = time_weight(t, r)
        weight[fakes] = 1
        base = (weight * self.distance(prediction, target)).mean()
        return base + self.rectify_weight * self.distance(prediction[generators], rectified).mean()

    def _residual(
        self,
        teacher: Velocity,
        F: Tensor,
        x_t: Tensor,
        v_star: Tensor,
        batch: Batch,
        draws: PublishedDraws,
    ) -> Tensor:
        """Return R of all rows after two jumps of the teacher, all rows in both."""
        t, r = draws.t, draws.r
        later = (t - self.delta).maximum(r)
        halfway = (later + r) / 2
        x = x_t - self.delta * v_star
        F_first = teacher(x, later, halfway, batch.cond)
        x = x - expand(later - halfway, x) * F_first
        F_second = teacher(x, halfway, r, batch.cond)
        S = expand(later - halfway, x) * F_first + expand(halfway - r, x) * F_second
        far = (t - r >= self.delta)[:, None, None, None]
        return torch.where(far, (expand(t - r, x) * F - S) / self.delta - v_star, F - v_star)
