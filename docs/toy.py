"""TwinFlow on eight dots in the plane, with the package's own code.

`python -m docs.toy` trains a flow-matching base and three few-step networks that start from it,
prints the numbers of method.md and draws its figures into docs/. One CPU thread is enough. The
plots need matplotlib, which `make install` brings along with mlxtend.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from docs import plot
from twinflow_train.batch import Batch, Condition, Times, Velocity
from twinflow_train.deal import Deal
from twinflow_train.engines.average import decay_at, follow
from twinflow_train.engines.optim import AdamW
from twinflow_train.flow.losses import l2
from twinflow_train.flow.path import interpolate
from twinflow_train.flow.sampler import Sampler, Style, grid, sample, trajectory
from twinflow_train.models.two_times import TwoTimes, pack_times
from twinflow_train.objectives import presets
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.rng import generator

RADIUS, SPREAD, STRAY = 1.5, 0.1, 0.35
"""Of the circle of dots; of a dot; and how far from every dot's centre a sample is astray."""

LATENT = (2,)
SEEN = 8000
"""Samples that every number is computed from."""

STEPS = (1, 2, 4)
MOMENTS = (10, 50, 100)
"""Steps of training at which the second figure looks at delta_v; it adds the end."""

EARLY = 50
"""The one of them at which the first figure looks at both sides of time 0."""

ANGLES = (torch.arange(8) + 0.5) * (math.pi / 4)
CENTRES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=-1)


def dots(samples: int, *path: object) -> Tensor:
    """Draw from the mixture of eight Gaussians; the same path gives the same points."""
    draws = generator("dots", *path)
    centre = CENTRES[torch.randint(8, (samples,), generator=draws)]
    return centre + SPREAD * torch.randn(samples, 2, generator=draws)


def normal(samples: int, *path: object) -> Tensor:
    """Draw standard normal points, the same for the same path."""
    return torch.randn(samples, 2, generator=generator("normal", *path))


def nothing(rows: int) -> Condition:
    """Return the empty condition: the toy has no prompts, and so no guidance."""
    return Condition(tokens=torch.zeros(rows, 1, 1))


class Waves(nn.Module):
    """Embed a signed time: itself, sines and cosines, and a small perceptron on them."""

    def __init__(self, width: int, *, waves: int = 6) -> None:
        super().__init__()
        self.frequencies = [math.pi / 2 * k for k in range(1, waves + 1)]
        self.layers = nn.Sequential(
            nn.Linear(2 * waves + 1, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, time: Tensor) -> Tensor:
        angle = time[:, None] * time.new_tensor(self.frequencies)
        embedding: Tensor = self.layers(torch.cat([time[:, None], angle.sin(), angle.cos()], -1))
        return embedding


class Net(nn.Module):
    """F(x_t, t, r, cond): a residual perceptron, its layers scaled and shifted by both times.

    The two times come in as in the large models: `TwoTimes` around a stock embedder of one time.
    """

    def __init__(self, *, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.times = TwoTimes(Waves(width))
            self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
            self.scales = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
                )
                for _ in range(blocks)
            )

    def forward(self, x_t: Tensor, t: Times, r: Times, cond: Condition) -> Tensor:
        embedding = nn.functional.silu(self.times(pack_times(t, r)))
        h = self.enter(x_t)
        for scale, block in zip(self.scales, self.blocks, strict=True):
            factor, shift = scale(embedding).chunk(2, dim=-1)
            h = h + block(h * (1 + factor) + shift)
        F: Tensor = self.leave(nn.functional.silu(h))
        return F


def fork(base: Net) -> Net:
    """Copy a base network, its second time embedder a copy of its first, as the models do it."""
    net = copy.deepcopy(base)
    net.times.embed_r.load_state_dict(net.times.embed.state_dict())
    return net


@dataclass(kw_only=True)
class Trained:
    """net: averaged weights; delta_v: mean |delta_v| by step; kept: raw networks by step."""

    net: Net
    delta_v: list[float] = field(default_factory=list)
    kept: dict[int, Net] = field(default_factory=dict)


def train(
    net: Net,
    objective: TwinFlow,
    *,
    steps: int,
    lr: float,
    batch: int = 256,
    keep: Sequence[int] = (),
    seed: int = 0,
) -> Trained:
    """Train `net` in place and return its average, which is also the teacher."""
    average = copy.deepcopy(net)
    parameters, averaged = list(net.parameters()), list(average.parameters())
    optim = AdamW(lr=lr, clip=0.5, warmup=20, constant=0.4)
    adam = optim.build(parameters)
    deal = Deal(batch=batch, micro_batch=batch, ranks=1, rank=0)
    result = Trained(net=average)
    for step in range(steps):
        if step in keep:
            result.kept[step] = copy.deepcopy(net)
        rows = Batch(
            data=dots(batch, "train", seed, step),
            cond=nothing(batch),
            null=nothing(1),
            keys=("",) * batch,
        )
        draws = objective.draw(deal, 0, seed=seed, step=step, latent=LATENT)
        loss = objective.loss(net, average, rows, draws)
        adam.zero_grad()
        loss.total.backward()
        nn.utils.clip_grad_norm_(parameters, optim.clip)
        adam.param_groups[0]["lr"] = optim.rate(step, steps)
        adam.step()
        decay = decay_at(objective.teacher_decay, step + 1)
        follow(averaged, parameters, decay, path=("toy", step))
        if "delta_v/after" in loss.metrics:
            result.delta_v.append(float(loss.metrics["delta_v/after"]))
    return result


def base_objective() -> TwinFlow:
    """Return plain flow matching; for two numbers a sample, with the plain squared error.

    The preset's distance is about the root mean square. Over many numbers that weighs samples
    alike; over two it would move the minimum from the mean velocity towards the median.
    """
    return replace(presets.flow_matching(), distance=l2(), time_weight=False)


OBJECTIVES: dict[str, Callable[[], TwinFlow]] = {
    "recursion only": presets.rcgm,
    "adversary only": lambda: TwinFlow(
        shares=Shares(jump=0), separate_means=True, rectify_weight=1.0
    ),
    "TwinFlow": TwinFlow,
}
"""What the base is continued with. With separate means, the generator rows of the second carry
L_rectify and nothing else, so that one can watch what it does."""


@dataclass(kw_only=True)
class Networks:
    """The base, and what became of copies of it, by objective."""

    base: Net
    few: dict[str, Trained]


def train_all(*, base_steps: int, few_steps: int, seed: int = 0) -> Networks:
    """Train the base and, from copies of it, a network for each objective."""
    base = train(Net(), base_objective(), steps=base_steps, lr=4e-3, seed=seed).net
    few = {
        name: train(
            fork(base),
            replace(objective(), guidance=0.0, distance=l2()),
            steps=few_steps,
            lr=1e-3,
            keep=MOMENTS,
            seed=seed,
        )
        for name, objective in OBJECTIVES.items()
    }
    return Networks(base=base, few=few)


def generate(net: Velocity, *, steps: int, style: Style, samples: int = SEEN) -> Tensor:
    """Sample from the noise that every network gets."""
    sampler = Sampler(steps=steps, style=style)
    return sample(net, normal(samples, "sample"), nothing(samples), sampler)


def distance(one: Tensor, other: Tensor, *, directions: int = 64) -> float:
    """Return the sliced 2-Wasserstein distance of two equally large sets of points."""
    angle = torch.arange(directions) * (math.pi / directions)
    lines = torch.stack([angle.cos(), angle.sin()])
    gaps = (one @ lines).sort(dim=0).values - (other @ lines).sort(dim=0).values
    return float(gaps.square().mean().sqrt())


def astray(points: Tensor) -> float:
    """Return the share of points that lie in none of the dots."""
    return float((torch.cdist(points, CENTRES).amin(1) > STRAY).float().mean())


@torch.no_grad()
def mean_delta_v(net: Velocity, points: Tensor, *, draws: int = 64) -> Tensor:
    """Return delta_v = F(x_tau, -tau, -tau) - F(x_tau, tau, tau) averaged over x_tau of each point.

    It is the expectation of what L_rectify adds to a one-step sample's target, clamped alike.
    """
    many, cond = points.repeat(draws, 1), nothing(draws * len(points))
    tau = torch.rand(len(many), generator=generator("tau"))
    x_tau = interpolate(many, normal(len(many), "rectify"), tau)
    pulled: Tensor = net(x_tau, -tau, -tau, cond) - net(x_tau, tau, tau, cond)
    return pulled.clamp(-1, 1).reshape(draws, *points.shape).mean(0)


def rounding(delta: float, dtype: torch.dtype) -> float:
    """Return the root mean square of the clamped R of an exact field whose output is rounded.

    The data are one point, where the exact velocity (x_t - point) / t leaves R = 0 everywhere.
    """
    rows = 1024
    point = torch.tensor([0.3, -0.7]).expand(rows, 2)

    def exact(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return ((x_t - point[: len(x_t)]) / t[:, None]).to(dtype).float()

    objective = TwinFlow(
        shares=Shares(generator=1, local=0, jump=0, fake=0),
        rectify_weight=0.0,
        delta=delta,
        guidance=0.0,
        distance=l2(),
        time_weight=False,
    )
    batch = Batch(data=point, cond=nothing(rows), null=nothing(1), keys=("",) * rows)
    deal = Deal(batch=rows, micro_batch=rows, ranks=1, rank=0)
    loss = objective.loss(
        exact, exact, batch, objective.draw(deal, 0, seed=0, step=0, latent=LATENT)
    )
    return float(loss.total.sqrt())


def rows_of(networks: Networks) -> dict[str, list[plot.Cell]]:
    """Sample every network in few steps: the base by Euler's method, the others by their jumps."""
    named = {"base": networks.base} | {name: few.net for name, few in networks.few.items()}
    rows = {}
    for name, net in named.items():
        style = Style.multi if name == "base" else Style.any
        rows[name] = [
            cell(f"{n} steps" if n > 1 else "1 step", generate(net, steps=n, style=style))
            for n in STEPS
        ]
    return rows


def beside(base: Net) -> tuple[plot.Cell, plot.Cell]:
    """Return fresh data, and the base in many steps."""
    many = generate(base, steps=30, style=Style.multi)
    return cell("data", dots(SEEN, "more")), cell("base, 30 steps", many)


def cell(title: str, points: Tensor) -> plot.Cell:
    """Measure samples, and keep some of them to be shown."""
    apart = distance(points, dots(SEEN, "real"))
    return plot.Cell(title=title, points=points[:2000], distance=apart, astray=astray(points))


@torch.no_grad()
def side(net: Velocity, data: Tensor) -> plot.Side:
    """Follow one branch of a network from noise to data, and noise its data."""
    z = normal(60, "flow")
    sampler = Sampler(steps=60, style=Style.multi)
    states = [step.x for step in trajectory(net, z, nothing(len(z)), sampler)]
    noise = normal(len(data), "seen")
    seen = {t: interpolate(data, noise, torch.full((len(data),), t)) for t in (1.0, 0.6, 0.3, 0.0)}
    return plot.Side(times=grid(sampler).tolist(), flow=torch.stack([z, *states]), seen=seen)


def draw_two_sides(net: Net, path: Path) -> None:
    """Draw both sides of time 0 for a network in training."""

    def fake(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        F: Tensor = net(x_t, -t, -r, cond)
        return F

    own = generate(net, steps=1, style=Style.few, samples=1500)
    z = torch.tensor([[-1.7, 0.3], [-0.6, -1.0], [0.2, 0.1], [0.9, 1.2], [1.9, -0.4]])
    x_hat = sample(net, z, nothing(len(z)), Sampler())
    plot.two_sides(path, side(net, dots(1500, "real")), side(fake, own), (z, x_hat))


def moments(trained: Trained) -> list[plot.Moment]:
    """Look at one-step samples and delta_v in the course of a training."""
    nets = {f"after {step} steps": trained.kept[step] for step in MOMENTS}
    found = []
    for title, net in (nets | {"at the end": trained.net}).items():
        samples = generate(net, steps=1, style=Style.few, samples=900)
        arrows = mean_delta_v(net, samples[:120])
        found.append(plot.Moment(title=title, samples=samples, arrows=arrows))
    return found


def smooth(values: Sequence[float], *, span: int = 20) -> list[float]:
    """Return running means."""
    return [sum(values[i : i + span]) / span for i in range(len(values) - span + 1)]


def draw(networks: Networks, rows: dict[str, list[plot.Cell]], out: Path) -> None:
    """Draw the three figures."""
    draw_two_sides(networks.few["TwinFlow"].kept[EARLY], out / "method_sides.png")
    fought = {name: networks.few[name] for name in ("adversary only", "TwinFlow")}
    plot.pull(
        out / "method_delta_v.png",
        dots(2000, "real"),
        {name: moments(few) for name, few in fought.items()},
        {name: smooth(few.delta_v) for name, few in fought.items()},
    )
    plot.few_steps(out / "method_few_steps.png", rows, beside(networks.base))


def tell(networks: Networks, rows: dict[str, list[plot.Cell]]) -> None:
    """Print the numbers of method.md."""
    for name, cells in (rows | {"beside": [*beside(networks.base)]}).items():
        for each in cells:
            print(
                f"{name:15} {each.title:15} distance {each.distance:.3f} astray {each.astray:.1%}"
            )
    for name, few in networks.few.items():
        if any(few.delta_v):
            print(f"{name:15} mean |delta_v| of the last 100 steps {mean(few.delta_v[-100:]):.3f}")
    for delta in (0.01, 0.02, 0.05):
        for dtype in (torch.float32, torch.bfloat16):
            print(f"R of an exact field, delta {delta}, {dtype}: {rounding(delta, dtype):.1e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the numbers, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here, help="folder of the figures (docs)")
    parser.add_argument("--base-steps", type=int, default=2000, help="of flow matching")
    parser.add_argument("--few-steps", type=int, default=1000, help="of each few-step training")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    options = parser.parse_args(arguments)
    if options.few_steps <= max(MOMENTS):
        parser.error(
            f"--few-steps is {options.few_steps}: the figures need more than {MOMENTS[-1]}"
        )
    torch.set_num_threads(1)
    began = time.perf_counter()
    networks = train_all(
        base_steps=options.base_steps, few_steps=options.few_steps, seed=options.seed
    )
    rows = rows_of(networks)
    tell(networks, rows)
    draw(networks, rows, options.out)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
