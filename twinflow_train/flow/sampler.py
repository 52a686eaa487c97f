"""From noise to data in few steps: the UCGM sampler (arXiv 2505.07447) for any-step velocities."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from twinflow_train.batch import Condition, Velocity
from twinflow_train.errors import UserError, check
from twinflow_train.flow.path import interpolate, jump, recover

INFINITY = float("inf")
Noise = Callable[[int], Tensor]
"""eps(k): fresh noise of the k-th stochastic step, shaped like the images, keyed by the caller."""


class Style(Enum):
    """The target time r of a step from t to t_next: data (0), t_next, or t itself."""

    few = "few"
    any = "any"
    multi = "multi"


@dataclass(kw_only=True)
class Sampler:
    """How time is stepped through; a value out of range is a UserError that names its key.

    steps: network calls an image; with order 2 they make (steps + 1) // 2 steps of Heun's method.
    order: 1, or 2 (`multi` only, without noise and extrapolation).
    stochasticity: share of the predicted noise's variance that is replaced by fresh noise.
    sde: choose that share so that the marginals stay (`multi` only).
    extrapolation: how far predictions are moved on from the previous step's.
    kumaraswamy: exponents a, b, c of u -> (1 - (1 - u^a)^b)^c on the uniform grid.
    start_gap, end_gap: time left out before the first and after the last step.
    guidance: weight w of F_null + w (F_cond - F_null) where guidance_low <= t <= guidance_high
        (`multi` only; 1 asks for no null prediction).
    """

    steps: int = 1
    style: Style = Style.few
    order: int = 1
    stochasticity: float = 0.0
    sde: bool = False
    extrapolation: float = 0.0
    kumaraswamy: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    start_gap: float = 0.001
    end_gap: float = 0.0
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0

    def __post_init__(self) -> None:
        check("sampler", self, self._rules())
        if not (self.start_gap + self.end_gap < 1 and self.start_gap < 1 - self.end_gap):
            raise UserError(
                f"sampler.start_gap is {self.start_gap} and sampler.end_gap is {self.end_gap}; "
                "their sum must be below 1, or time would run backwards"
            )
        if not bool((grid(self).diff() < 0).all()):
            raise UserError(
                f"sampler.kumaraswamy is {self.kumaraswamy}; with sampler.steps {self.steps} "
                f"between the gaps {self.start_gap} and {self.end_gap} some steps would have no "
                "length: choose exponents nearer to 1"
            )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield (key, whether its value is allowed, what is allowed)."""
        multi, noisy = self.style is Style.multi, bool(self.stochasticity) or self.sde
        low, high, exponents = self.guidance_low, self.guidance_high, self.kumaraswamy
        positive = len(exponents) == 3 and all(0 < e < INFINITY for e in exponents)
        heun = multi and not noisy and not self.extrapolation
        number, neutral = 0 <= self.guidance < INFINITY, self.guidance == 1
        yield "steps", self.steps >= 1, "at least 1"
        yield "stochasticity", 0 <= self.stochasticity <= 1, "in [0, 1]"
        yield "extrapolation", 0 <= self.extrapolation <= 1, "in [0, 1]"
        yield "kumaraswamy", positive, "three positive numbers"
        yield "start_gap", 0 <= self.start_gap < 1, "in [0, 1)"
        yield "end_gap", 0 <= self.end_gap < 1, "in [0, 1)"
        yield "sde", not self.sde or multi, "false unless sampler.style is multi"
        allowed = "0 with sampler.sde, which chooses it"
        yield "stochasticity", not (self.sde and self.stochasticity), allowed
        yield "order", self.order in (1, 2), "1 or 2"
        allowed = "1 unless sampler.style is multi, sde false, stochasticity and extrapolation 0"
        yield "order", self.order == 1 or heun, allowed
        yield "guidance", number, "a number from 0 on"
        yield "guidance", neutral or multi, "1 unless sampler.style is multi"
        yield "guidance_low", 0 <= low < high, f"in [0, guidance_high), here [0, {high})"
        yield "guidance_high", high <= 1, "at most 1"

    @property
    def nfe(self) -> int:
        """Network evaluations that one image costs; a guided one counts twice."""
        times = grid(self).tolist()[:-1]
        asked = times if self.order == 1 else times + times[1:]
        return sum(1 if self.weight(t) == 1 else 2 for t in asked)

    def weight(self, t: float) -> float:
        """Return the guidance weight at time t, 1 outside the window."""
        return self.guidance if self.guidance_low <= t <= self.guidance_high else 1.0

    def share(self, t: float, t_next: float) -> float:
        """Return the share of fresh noise in the step from t to t_next, none in the one to data."""
        if t_next == 0:
            return 0.0
        return min(2 * t * abs(t - t_next) / t_next**2, 1.0) if self.sde else self.stochasticity

    def target(self, t: float, t_next: float) -> float:
        """Return the target time r that the network is asked for."""
        return {Style.few: 0.0, Style.any: t_next, Style.multi: t}[self.style]


@dataclass(kw_only=True)
class Step:
    """One step's outcome: the data predicted at its start, before extrapolation, and its end."""

    x_hat: Float[Tensor, "b *chw"]
    x: Float[Tensor, "b *chw"]


def grid(sampler: Sampler) -> Float64[Tensor, " times"]:
    """Return the times from noise to data, the last one 0 (UCGM's Kumaraswamy schedule)."""
    steps = sampler.steps if sampler.order == 1 else (sampler.steps + 1) // 2
    end = 1 - sampler.end_gap
    points = steps + 1 if end == 1 else steps
    u = torch.linspace(sampler.start_gap, end, points, dtype=torch.float64)[:steps]
    a, b, c = sampler.kumaraswamy
    t = 1 - (1 - (1 - u**a) ** b) ** c
    return torch.cat([t, t.new_zeros(1)])


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Float[Tensor, "b *chw"],
    cond: Condition,
    sampler: Sampler,
    *,
    null: Condition | None = None,
    eps: Noise | None = None,
) -> Float[Tensor, "b *chw"]:
    """Turn noise into data, in noise's dtype, without gradients; arguments as in `trajectory`."""
    x = noise
    for step in trajectory(velocity, noise, cond, sampler, null=null, eps=eps):
        x = step.x
    return x.to(noise.dtype)


def trajectory(
    velocity: Velocity,
    noise: Float[Tensor, "b *chw"],
    cond: Condition,
    sampler: Sampler,
    *,
    null: Condition | None = None,
    eps: Noise | None = None,
) -> Iterator[Step]:
    """Yield every step from noise to data (UCGM, algorithm 2), the state in float64.

    The network sees noise's dtype, and times in float32 (float64 if noise is).  `null`, of one
    row, is needed with guidance and `eps` with stochasticity: a ValueError says so.
    """
    if eps is None and (sampler.stochasticity or sampler.sde):
        raise ValueError("sampler.stochasticity and sampler.sde need `eps`, the source of noise")
    pair = cond
    if sampler.guidance != 1:
        if null is None:
            raise ValueError(f"sampler.guidance is {sampler.guidance}, which needs `null`")
        pair = Condition.cat([cond, null.expand(len(cond))])
    x = noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)

    times = torch.float64 if noise.dtype == torch.float64 else torch.float32

    def ask(x: Tensor, t: float, r: float) -> Tensor:
        weight = sampler.weight(t)
        inputs, given = (x, cond) if weight == 1 else (torch.cat([x, x]), pair)
        now, then = (inputs.new_full((len(inputs),), time, dtype=times) for time in (t, r))
        F = velocity(inputs.to(noise.dtype), now, then, given).to(x.dtype)
        if weight == 1:
            return F
        F_cond, F_null = F.chunk(2)
        return F_null + weight * (F_cond - F_null)

    before: tuple[Tensor, Tensor] | None = None
    for i, (t, t_next) in enumerate(pairwise(grid(sampler).tolist())):
        F = ask(x, t, sampler.target(t, t_next))
        now, then = x.new_full((len(x),), t), x.new_full((len(x),), t_next)
        x_hat, z_hat = ends = recover(x, F, now)
        if sampler.extrapolation and before is not None and i >= 2:
            x_hat = x_hat + sampler.extrapolation * (x_hat - before[0])
            z_hat = z_hat + sampler.extrapolation * (z_hat - before[1])
        share = sampler.share(t, t_next)
        if share and eps is not None:
            z_hat = (1 - share) ** 0.5 * z_hat + share**0.5 * eps(i).to(x)
        if sampler.order == 2 and t_next > 0:
            F = (F + ask(jump(x, F, now, then), t_next, t_next)) / 2
            x = jump(x, F, now, then)
        else:
            x = interpolate(x_hat, z_hat, then)
        before = ends
        yield Step(x_hat=ends[0], x=x)


FEW = {
    1: Sampler(),
    2: Sampler(steps=2, stochasticity=1.0, end_gap=0.6),
    4: Sampler(steps=4, stochasticity=1.0, end_gap=0.5),
}
"""The published settings for few steps, by their number."""

ANY = {
    4: Sampler(style=Style.any, steps=4, end_gap=0.5),
    8: Sampler(style=Style.any, steps=8, end_gap=0.5),
}
"""The published settings with r = t_next, by their number of steps."""

MANY = {30: Sampler(style=Style.multi, steps=30, kumaraswamy=[1.17, 0.8, 1.1])}
"""The same for a multi-step base, unguided."""


def published(style: Style, steps: int) -> Sampler:
    """Return the published settings of a style; other numbers of steps are as the largest known."""
    known = {Style.few: FEW, Style.any: ANY, Style.multi: MANY}[style]
    return known.get(steps) or replace(known[max(known)], steps=steps)
