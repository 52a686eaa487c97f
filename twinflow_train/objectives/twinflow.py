"""TwinFlow (arXiv 2512.05150): one network as generator, real score (t > 0) and fake score (t < 0).

The loss of an optimizer step is the sum of `TwinFlow.loss` over micro-steps and ranks: every mean
is taken over the global batch. Notation as in the paper; F is dx/dt, time 1 is noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Batch, Condition, Velocity
from twinflow_train.deal import Deal
from twinflow_train.draws import Draws, Table
from twinflow_train.errors import check
from twinflow_train.flow.losses import Distance
from twinflow_train.flow.path import expand, interpolate, jump, recover
from twinflow_train.flow.times import beta_quantile, stratify, time_weight
from twinflow_train.objectives.roles import Shares
from twinflow_train.passes import Pass, run
from twinflow_train.rng import generator

LOCAL_GAP = 0.05  # largest part of t that a local row jumps over


@dataclass(kw_only=True)
class Loss:
    """A micro-batch's share of loss and metrics: sums over micro-steps and ranks are means.

    terms: what the loss is the sum of, by name: "base", "fake" and "rectify", those that count.
    rows: each row's distances, to tell which samples are strange.
    """

    terms: dict[str, Float[Tensor, ""]]
    metrics: dict[str, Tensor]
    rows: Float[Tensor, " b"]

    @property
    def total(self) -> Float[Tensor, ""]:
        """What to differentiate."""
        return sum(self.terms.values(), start=torch.zeros(()))


@dataclass(kw_only=True)
class TwinFlow:
    """TwinFlow's objective, with every published variant as a setting.

    shares: relative shares of the roles in the global batch.
    order: N, Euler jumps of the teacher in the recursion's target; 0 is flow matching.
    random_grid: draw the inner times of those jumps instead of spacing them evenly.
    delta: the recursion's small step; its noise is amplified by 1 / delta.
    guidance: rho, strength of the guidance trained into the weights; with an averaged or self
        teacher the fixed point is guidance 1 / (1 - rho), with a frozen one 1 + rho.
    guidance_low, guidance_high: guide only strictly between these times.
    teacher_decay: decay of the averaged teacher; 0: the network itself, 1: the frozen initial
        network, which then guides only.
    rectify_weight: weight of L_rectify on the generator rows.
    consistency_ratio: kappa, largest part of t that a jump covers.
    time_alpha, time_beta: t ~ Beta(alpha, beta).
    stratified: draw t stratified over the rows of a role: each t alone keeps its distribution.
    distance: how far a prediction is from its target; time_weight: weigh rows by their times.
    separate_means: weigh each role's mean 1:1:1 and give generator rows L_rectify only.
    image_free: train on the network's own samples instead of data; needs a frozen teacher.
    null_share: share of the local rows trained on the null prompt, for a base to be guided later.
    """

    shares: Shares = field(default_factory=Shares)
    order: int = 2
    random_grid: bool = False
    delta: float = 0.01
    guidance: float = 0.8
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    teacher_decay: float = 0.99
    rectify_weight: float = 0.5
    consistency_ratio: float = 1.0
    time_alpha: float = 1.0
    time_beta: float = 1.0
    stratified: bool = True
    distance: Distance = field(default_factory=Distance)
    time_weight: bool = True
    separate_means: bool = False
    image_free: bool = False
    null_share: float = 0.0

    def __post_init__(self) -> None:
        check("objective", self, self._rules())
        if self.rectify_weight and not self.shares.fake:
            warnings.warn(
                "objective.shares.fake is 0: the fake branch stays untrained", stacklevel=2
            )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        frozen, low, high = self.teacher_decay == 1, self.guidance_low, self.guidance_high
        settles = self.guidance < 1 or frozen
        leaps, idle = self.shares.jump or self.shares.direct, not self.shares.generator
        unmeant = not idle and (self.separate_means or not self.order) and not self.rectify_weight
        yield "order", self.order >= 0, "0 or more"
        yield "order", self.order > 0 or not leaps, "1 or more where there are jump or direct rows"
        yield "delta", 0 < self.delta <= 0.5, "in (0, 0.5]"
        yield "guidance", 0 <= self.guidance < math.inf, "0 or more"
        yield "guidance", settles, "below 1 unless teacher_decay is 1: it comes to 1 / (1 - rho)"
        yield "guidance", self.guidance > 0 or not self.image_free, "positive with image_free"
        yield "guidance_high", high <= 1, "at most 1"
        yield "guidance_low", 0 <= low < high, "in [0, objective.guidance_high)"
        yield "teacher_decay", 0 <= self.teacher_decay <= 1, "in [0, 1]"
        yield "image_free", frozen or not self.image_free, "false unless objective.teacher_decay=1"
        yield "rectify_weight", 0 <= self.rectify_weight < math.inf, "0 or more"
        yield "rectify_weight", not (self.rectify_weight and idle), "0 without generator rows"
        yield "rectify_weight", not unmeant, "positive: else nothing counts the generator rows"
        yield "consistency_ratio", 0 <= self.consistency_ratio <= 1, "in [0, 1]"
        yield "time_alpha", 0 < self.time_alpha < math.inf, "positive"
        yield "time_beta", 0 < self.time_beta < math.inf, "positive"
        yield "null_share", 0 <= self.null_share < 1, "in [0, 1)"
        yield "null_share", not self.null_share or self.shares.local > 0, "0 without local rows"

    def terms(self, batch: int) -> list[str]:
        """Name the terms that a global batch gives the loss."""
        roles = self._weights(self.shares.counts(batch)).keys()
        found = {"base": roles - {"fake"}, "fake": "fake" in roles, "rectify": self.rectify_weight}
        return [name for name, counts in found.items() if counts]

    def table(self, batch: int, *, seed: int, step: int) -> Table:
        """Draw roles and times of a whole global batch and what each needs."""
        counts = self.shares.counts(batch)
        kappa, ts, rs = self.consistency_ratio, [], []
        for role, n in counts.items():
            u, gap = (torch.rand(n, generator=generator(k, seed, step, role)) for k in ("t", "gap"))
            if self.stratified:
                u = stratify(u, torch.randperm(n, generator=generator("s", seed, step, role)), n)
            t = beta_quantile(u, self.time_alpha, self.time_beta)
            t = torch.ones(n) if role == "generator" else t
            part = {"local": min(LOCAL_GAP, kappa) * gap, "jump": kappa * gap, "fake": 0 * gap}
            ts.append(t)
            rs.append(t - t * part.get(role, torch.ones(n)))
        t, r = torch.cat(ts), torch.cat(rs)
        index = torch.arange(batch)
        fake = index >= batch - counts["fake"]
        generators = index < counts["generator"]
        based = ~fake & ~(generators & self.separate_means)
        guided = (t > self.guidance_low) & (t < self.guidance_high) & based
        needs = {
            "generate": fake | (based & self.image_free),
            "guide": guided & (self.guidance > 0),
            "recurse": (t - r >= self.delta) & based & (self.order > 0),
            "rectify": generators & (self.rectify_weight > 0),
        }
        return Table(counts=counts, t=t, r=r, needs=needs)

    def draw(
        self, deal: Deal, micro: int, *, seed: int, step: int, latent: tuple[int, ...]
    ) -> Draws:
        """Draw, on the CPU, what (seed, step, sample index) give samples of shape `latent`."""
        table = self.table(deal.batch, seed=seed, step=step)
        mine = deal.mine(micro)
        rows = {name: need[mine].nonzero().flatten() for name, need in table.needs.items()}

        def noise(purpose: str, index: Tensor) -> Tensor:
            path = purpose, seed, step
            each = [torch.randn(latent, generator=generator(*path, i)) for i in index.tolist()]
            return torch.stack(each) if each else torch.zeros(0, *latent)

        def uniform(purpose: str, *columns: int) -> Tensor:
            return torch.rand(deal.batch, *columns, generator=generator(purpose, seed, step))[mine]

        inner = max(1, self.order)
        even = (torch.arange(1, inner) / inner).expand(len(mine), -1)
        roles = table.slices(mine)
        local = torch.zeros(len(mine), dtype=torch.bool)
        local[roles["local"]] = True
        return Draws(
            counts=table.counts,
            roles=roles,
            t=table.t[mine],
            r=table.r[mine],
            noise=noise("noise", mine),
            noise_fake=noise("noise-fake", mine[rows["generate"]]),
            noise_rectify=noise("noise-rectify", mine[rows["rectify"]]),
            tau=uniform("tau")[rows["rectify"]],
            grid=uniform("grid", inner - 1).sort().values if self.random_grid else even,
            unconditional=(uniform("null") < self.null_share) & local,
            calls=table.calls(deal.everyone(micro)),
            **rows,
        )

    def loss(self, student: Velocity, teacher: Velocity, batch: Batch, draws: Draws) -> Loss:
        """Compute L_base + L_adv + rectify_weight L_rectify of a micro-batch.

        Everything from x_t to the residual is float32, float64 for float64 data; no argument is
        written to. `teacher` may be `student` itself: their passes then share calls.
        """
        dtype = torch.promote_types(batch.data.dtype, torch.float32)
        data, draws = batch.data.to(dtype), draws.to(batch.data.device, dtype)
        z, t, fake = draws.noise, draws.t, draws.roles["fake"]
        cond = _conditions(batch, draws) if self.null_share else batch.cond
        filler = Pass("", student, z[:1], t[:1], t[:1], cond[slice(0, 1)])

        # Data of the fake rows, and guidance.
        one = torch.ones_like(draws.generate, dtype=dtype)
        z_fake, rows = draws.noise_fake, draws.generate
        generate = Pass("generate", student, z_fake, one, 0 * one, cond[rows])
        if self.image_free:  # guidance has to wait for its data
            (F,) = run(draws.calls, generate, filler=filler)
            data = data.index_copy(0, rows, recover(z_fake, F, one)[0])
        x_t = interpolate(data, z, t)
        guide = _guidance_pass(teacher, x_t, cond, batch.null, draws)
        if self.image_free:
            (F_guide,) = run(draws.calls, guide, filler=filler)
        else:
            F, F_guide = run(draws.calls, generate, guide, filler=filler)
            data = data.index_copy(0, rows, recover(z_fake, F, one)[0])
        x_t, v = interpolate(data, z, t), z - data
        v_star = self._enhanced(v, F_guide, draws.guide)

        # The only pass with gradient: real rows at (t, r), fake rows at (-t, -t).
        sign = torch.ones_like(t)
        sign[fake] = -1
        prediction = student(x_t, sign * t, sign * draws.r, cond)
        F = prediction.detach()

        # Targets.
        x_hat, _ = recover(x_t, F, t)
        rectify = _rectification_pass(student, x_hat, cond, draws)
        jumps = student if self.teacher_decay == 1 else teacher
        S, F_pair = self._displacement(jumps, rectify, x_t, v_star, cond, draws, filler)
        residual = self._residual(F, S, v_star, draws)
        clamped = residual.clamp(-1, 1) if self.order else residual
        target = F - clamped
        target[fake] = v[fake]
        F_real, F_fake = F_pair.chunk(2)
        delta_v = F_fake - F_real

        # Distances.
        weight = time_weight(t, draws.r) if self.time_weight else torch.ones_like(t)
        weight[fake] = 1
        base = weight * self.distance(prediction, target)
        rectified = self.distance(
            prediction[draws.rectify], F[draws.rectify] - delta_v.clamp(-1, 1)
        )
        weights = self._weights(draws.counts)
        terms: dict[str, Tensor] = {}
        for role, each in weights.items():
            term = "fake" if role == "fake" else "base"
            terms[term] = terms.get(term, 0) + each * base[draws.roles[role]].sum()
        metrics = _base_metrics(draws, [*weights], base, residual if self.order else None)
        if self.rectify_weight:
            terms["rectify"] = self.rectify_weight * rectified.sum() / draws.counts["generator"]
            metrics |= _rectification_metrics(draws, rectified, F_real, F_fake)
        rows = base.detach().index_add(0, draws.rectify, rectified.detach())
        loss = Loss(terms=terms, metrics=metrics, rows=rows)
        loss.metrics["loss/total"] = loss.total.detach()
        return loss

    def _enhanced(self, v: Tensor, F_guide: Tensor, rows: Tensor) -> Tensor:
        """Return the target velocity v* with guidance built in."""
        F_cond, F_null = F_guide.chunk(2)
        start = F_null if self.image_free else v[rows]
        return v.index_copy(0, rows, start + self.guidance * (F_cond - F_null))

    def _displacement(
        self,
        network: Velocity,
        rectify: Pass,
        x_t: Tensor,
        v_star: Tensor,
        cond: Condition,
        draws: Draws,
        filler: Pass,
    ) -> tuple[Tensor, Tensor]:
        """Return S, the teacher's way from t - delta to r in N jumps, and the rectification's F.

        Rectification does not depend on the jumps, so it shares the first one's call when it can.
        """
        rows = draws.recurse
        cond_rows, r, t = cond[rows], draws.r[rows], draws.t[rows]
        later = (t - self.delta).maximum(r)
        x = x_t[rows] - self.delta * v_star[rows]
        S = torch.zeros_like(x)
        taus = [later, *(later.lerp(r, part) for part in draws.grid[rows].T), r]
        beside, pair = [rectify], [rectify.x_t]
        for now, then in pairwise(taus):
            leap = Pass("recurse", network, x, now, then, cond_rows)
            F, *found = run(draws.calls, leap, *beside, filler=filler)
            beside, pair = [], found or pair
            S = S + expand(now - then, x) * F
            x = jump(x, F, now, then)
        return S, pair[0]

    def _residual(self, F: Tensor, S: Tensor, v_star: Tensor, draws: Draws) -> Tensor:
        """Return R: how far F is from obeying the recursion, or from v* where no jump is left."""
        rows = draws.recurse
        gap = expand(draws.t[rows] - draws.r[rows], S)
        recursion = (gap * F[rows] - S) / self.delta - v_star[rows]
        return (F - v_star).index_copy(0, rows, recursion)

    def _weights(self, counts: dict[str, int]) -> dict[str, float]:
        """Return what a row of each role counts, so that sums over the global batch are means."""
        idle = {"generator"} if self.separate_means else set()
        base = [role for role in counts if role not in {"fake", *idle}] if self.order else ["local"]
        real, fake = sum(counts[role] for role in base), counts["fake"]
        if not self.separate_means:
            real = fake = real + fake
        weights = dict.fromkeys(base, 1 / max(1, real)) | {"fake": 1 / max(1, fake)}
        return {role: each for role, each in weights.items() if counts[role]}


def _conditions(batch: Batch, draws: Draws) -> Condition:
    """Return each row's condition, the null prompt for unconditional rows."""
    index = torch.arange(len(batch), device=draws.unconditional.device)
    null = len(batch) + (index if len(batch.null) > 1 else 0 * index)
    return Condition.cat([batch.cond, batch.null])[torch.where(draws.unconditional, null, index)]


def _guidance_pass(
    teacher: Velocity, x_t: Tensor, cond: Condition, null: Condition, draws: Draws
) -> Pass:
    """Ask the teacher on the diagonal, with the condition and with the null prompt."""
    rows, t = draws.guide, draws.t[draws.guide]
    nulls = null.expand(len(rows)) if len(null) == 1 else null[rows]
    x_t, t = torch.cat([x_t[rows], x_t[rows]]), torch.cat([t, t])
    return Pass("guide", teacher, x_t, t, t, Condition.cat([cond[rows], nulls]))


def _rectification_pass(student: Velocity, x_hat: Tensor, cond: Condition, draws: Draws) -> Pass:
    """Ask the real and the fake velocity at noised one-step samples of the generator rows."""
    rows, tau = draws.rectify, draws.tau
    x_tau = interpolate(x_hat[rows], draws.noise_rectify, tau)
    x_tau, times = torch.cat([x_tau, x_tau]), torch.cat([tau, -tau])
    return Pass("rectify", student, x_tau, times, times, Condition.cat([cond[rows], cond[rows]]))


def _base_metrics(
    draws: Draws, roles: list[str], base: Tensor, residual: Tensor | None
) -> dict[str, Tensor]:
    """Return this micro-batch's share of each metric; `roles` are those whose distances count."""
    counts, real = draws.counts, [role for role in roles if role != "fake"]

    def mean(values: Tensor, *over: str) -> Tensor:
        rows = [values[draws.roles[role]].sum() for role in over]
        return torch.stack(rows).sum() / sum(counts[role] for role in over)

    found = {f"loss/{role}": mean(base, role) for role in roles}
    if real:
        found["loss/base"] = mean(base, *real)
    if real and residual is not None:
        found["residual/clamped"] = mean(_means(residual.abs() > 1), *real)
    return {name: value.detach() for name, value in found.items()}


def _rectification_metrics(
    draws: Draws, rectified: Tensor, F_real: Tensor, F_fake: Tensor
) -> dict[str, Tensor]:
    """Return this micro-batch's share of what there is to say of the generator rows' delta_v."""
    delta_v, pair = F_fake - F_real, (F_real.flatten(1), F_fake.flatten(1))
    found = {
        "loss/rectify": rectified,
        "delta_v/before": _means(delta_v.abs()),
        "delta_v/after": _means(delta_v.clamp(-1, 1).abs()),
        "delta_v/cosine": torch.cosine_similarity(*pair).float(),
    }
    return {name: v.detach().sum() / draws.counts["generator"] for name, v in found.items()}


def _means(values: Tensor) -> Tensor:
    """Return each row's mean."""
    return values.float().flatten(1).mean(1)
