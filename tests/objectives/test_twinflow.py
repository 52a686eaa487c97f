"""The loss: equal to the equations row by row, with the fixed points that it must have."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.objectives.toys import (
    LATENT,
    at_times,
    gradients,
    network,
    normal,
    nothing,
    toy_batch,
    whole,
)
from twinflow_train.batch import Batch, Condition, Times, Velocity
from twinflow_train.draws import Draws
from twinflow_train.flow.losses import Distance, l2
from twinflow_train.objectives import presets
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.rng import generator

JUMPS = Shares(generator=0, local=0, fake=0)


def plain(o: TwinFlow, student: Velocity, teacher: Velocity, batch: Batch, draws: Draws) -> Tensor:
    """Compute the loss of a global batch as the paper states it, one row at a time."""
    role_of = {i: role for role, rows in draws.roles.items() for i in range(rows.start, rows.stop)}
    jumps = student if o.teacher_decay == 1 else teacher
    fresh, again = iter(draws.noise_fake.double()), zip(draws.noise_rectify, draws.tau, strict=True)
    base: dict[str, list[Tensor]] = {role: [] for role in draws.roles}
    rectified: list[Tensor] = []

    def ask(net: Velocity, x: Tensor, t: float, r: float, cond: Condition) -> Tensor:
        return net(x[None], x.new_tensor([t]), x.new_tensor([r]), cond)[0]

    def d(pred: Tensor, target: Tensor) -> Tensor:
        return o.distance(pred[None], target[None])[0]

    for i, x in enumerate(batch.data.double()):
        role, z, t, r = role_of[i], draws.noise[i].double(), float(draws.t[i]), float(draws.r[i])
        null = batch.null[slice(i, i + 1)] if len(batch.null) > 1 else batch.null
        c = null if draws.unconditional[i] else batch.cond[slice(i, i + 1)]
        if role == "fake" or o.image_free:
            z_fake = next(fresh)
            x = z_fake - ask(student, z_fake, 1.0, 0.0, c).detach()
        x_t, v = t * z + (1 - t) * x, z - x
        if role == "fake":
            base[role].append(d(ask(student, x_t, -t, -t, c), v))
            continue
        if o.guidance and o.guidance_low < t < o.guidance_high:
            given, free = (ask(teacher, x_t, t, t, asked).detach() for asked in (c, null))
            v = (free if o.image_free else v) + o.guidance * (given - free)
        prediction = ask(student, x_t, t, r, c)
        F = prediction.detach()
        if o.order == 0:
            target = v
        elif t - r < o.delta:
            target = F - (F - v).clamp(-1, 1)
        else:
            later = max(t - o.delta, r)
            inner = [later + (r - later) * float(part) for part in draws.grid[i]]
            y, S = x_t - o.delta * v, torch.zeros_like(x)
            for now, then in pairwise([later, *inner, r]):
                leap = ask(jumps, y, now, then, c).detach()
                S = S + (now - then) * leap
                y = then * (y + (1 - now) * leap) + (1 - then) * (y - now * leap)
            target = F - (((t - r) * F - S) / o.delta - v).clamp(-1, 1)
        weight = math.tan((1 - (t - r)) * math.pi / 2.5) + 1 if o.time_weight else 1.0
        base[role].append(weight * d(prediction, target))
        if role == "generator" and o.rectify_weight:
            z_again, tau = next(again)
            x_tau = tau * z_again.double() + (1 - tau) * (x_t - t * F)
            real, fake = (
                ask(student, x_tau, s * float(tau), s * float(tau), c).detach() for s in (1, -1)
            )
            rectified.append(d(prediction, F - (fake - real).clamp(-1, 1)))

    def mean(*roles: str) -> Tensor:
        terms = [term for role in roles for term in base[role]]
        return torch.stack(terms).mean() if terms else torch.zeros(()).double()

    if o.separate_means:
        total = mean("local", "jump", "direct") + mean("fake")
    else:
        total = mean("local", "fake") if o.order == 0 else mean(*base)
    return total + (o.rectify_weight * torch.stack(rectified).mean() if rectified else 0)


VARIANTS = {
    "twinflow": TwinFlow(),
    "paper": presets.twinflow_paper(),
    "lora_order1": presets.twinflow_lora_order1(),
    "image_free": presets.twinflow_image_free(),
    "rcgm": presets.rcgm(),
    "rcgm_pure": presets.rcgm_pure(),
    "flow_matching": presets.flow_matching(),
    "self": TwinFlow(teacher_decay=0.0, guidance=0.5),
    "all_roles": TwinFlow(shares=Shares(direct=2, generator=2), order=3, random_grid=True),
    "window": TwinFlow(guidance_low=0.3, guidance_high=0.7, consistency_ratio=0.6),
    "image_free_window": replace(presets.twinflow_image_free(), guidance_high=0.5, null_share=0.5),
    "null_share": TwinFlow(null_share=0.7, order=1),
    "order0": TwinFlow(order=0, shares=Shares(jump=0), null_share=0.5),
    "delta": TwinFlow(delta=0.1, distance=l2(), time_weight=False, rectify_weight=3.0),
    "separate": TwinFlow(separate_means=True, order=1),
}


@pytest.mark.parametrize("nulls", [1, 12])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_are_the_methods(name: str, nulls: int) -> None:
    objective, batch = VARIANTS[name], toy_batch(12, nulls=nulls)
    student, teacher = network(0), network(1)
    parameters = list(student.parameters())
    draws = whole(objective, 12)
    ours = objective.loss(student, teacher, batch, draws).total
    theirs = plain(objective, student, teacher, batch, draws.to("cpu", torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for found, expected in zip(
        gradients(ours, parameters), gradients(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_terms_told_add_up_to_the_total(name: str) -> None:
    objective = VARIANTS[name]
    loss = objective.loss(network(0), network(1), toy_batch(12), whole(objective, 12))
    told = {key.removeprefix("loss/"): value.item() for key, value in loss.metrics.items()}
    counts = objective.shares.counts(12)
    idle = ("generator",) if objective.separate_means or not objective.order else ()
    real = sum(n for role, n in counts.items() if role not in ("fake", *idle))
    fake = counts["fake"]
    means = (1, 1) if objective.separate_means else (real / (real + fake), fake / (real + fake))
    terms = means[0] * told["base"] + means[1] * told.get("fake", 0.0)
    rectify = objective.rectify_weight * told.get("rectify", 0.0)
    assert told["total"] == pytest.approx(terms + rectify)
    assert told["total"] == pytest.approx(loss.total.item())


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_told_that_was_not_measured(name: str) -> None:
    objective = VARIANTS[name]
    loss = objective.loss(network(0), network(1), toy_batch(12), whole(objective, 12))
    told = set(loss.metrics)
    assert objective.terms(12) == [*loss.terms]
    assert ("loss/fake" in told) == ("fake" in loss.terms) == bool(objective.shares.fake)
    assert ("residual/clamped" in told) == (objective.order > 0)
    rectified = {"loss/rectify", "delta_v/before", "delta_v/after", "delta_v/cosine"}
    assert told & rectified == (rectified if objective.rectify_weight else set())


def test_only_rows_that_are_used_are_generated() -> None:
    usual = replace(presets.twinflow_image_free(), guidance_high=0.9)
    apart = replace(usual, separate_means=True)  # its generator rows need no data: x_1 is noise
    counts = usual.shares.counts(12)
    rows = {o.separate_means: whole(o, 12).generate.tolist() for o in (usual, apart)}
    assert rows[False] == list(range(12))
    assert rows[True] == list(range(counts["generator"], 12))


@dataclass(kw_only=True)
class Kept(Distance):
    """A distance that keeps pred - target of each call: the clamped residual, then delta_v."""

    found: list[Tensor] = field(default_factory=list)

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        self.found.append((pred - target).detach())
        return super().__call__(pred, target)


def residual(
    objective: TwinFlow, net: Velocity, batch: Batch, draws: Draws, *, delta: float = 0.01
) -> Tensor:
    """Return the clamped residual of every row."""
    kept = Kept(alpha=2.0)
    replace(objective, distance=kept, delta=delta).loss(net, net, batch, draws)
    return kept.found[0]


def straight(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
    """Be the perfect field of straight lines: each row's condition holds its velocity."""
    return cond.tokens.reshape(x_t.shape)


def knowing(batch: Batch, velocity: Tensor) -> Batch:
    """Tell the conditions the velocity."""
    cond = Condition(tokens=velocity.reshape(len(velocity), 1, -1))
    return replace(batch, cond=cond, null=cond)


orders = st.integers(1, 3)
pairs = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])),
    ),
    min_size=1,
    max_size=8,
)


def jumping(order: int, random_grid: bool) -> TwinFlow:
    return TwinFlow(
        shares=JUMPS, rectify_weight=0.0, order=order, random_grid=random_grid,
        time_weight=False, guidance=0.0,
    )  # fmt: skip


def chosen(
    objective: TwinFlow,
    where: list[tuple[float, float]],
    dtype: torch.dtype,
    latent: tuple[int, ...] = LATENT,
) -> Draws:
    """Draw rows at given times t, and r = t times the second number."""
    t, part = torch.tensor(where, dtype=dtype).T.contiguous()
    return at_times(whole(objective, len(t), latent=latent), t, t * part, objective.delta)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@given(pairs, orders, st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_straight_flow_leaves_no_residual_anywhere(
    dtype: torch.dtype, most: float, where: list[tuple[float, float]], order: int, grid: bool
) -> None:
    objective = jumping(order, grid)
    draws = chosen(objective, where, dtype)
    batch = toy_batch(len(where), dtype=dtype)
    v = draws.noise - batch.data
    R = residual(objective, straight, knowing(batch, v), draws)
    assert bool((R.abs() <= most * v.abs().clamp(min=1)).all())


@given(pairs, orders, st.booleans())
@settings(deadline=None, max_examples=60)
def test_flow_to_a_point_leaves_no_residual_anywhere(
    where: list[tuple[float, float]], order: int, grid: bool
) -> None:
    point = normal("point", *LATENT)

    def to_point(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return (x_t - point) / t.clamp(min=1e-300).reshape(-1, 1, 1, 1)

    objective = jumping(order, grid)
    # Down to time 0 the field itself is 0 / 0.
    where = [(max(t, 0.05), min(max(part, 0.01), 0.99)) for t, part in where]
    draws = chosen(objective, where, torch.float64)
    batch = replace(toy_batch(len(where)), data=point.expand(len(where), *LATENT))
    assert float(residual(objective, to_point, batch, draws).abs().max()) <= 1e-10


def test_a_field_that_ignores_the_jump_leaves_a_residual() -> None:
    def wrong(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return (1 + t - r).reshape(-1, 1, 1, 1) * straight(x_t, t, r, cond)

    objective = jumping(2, False)
    draws = chosen(objective, [(0.8, 0.5), (1.0, 0.0)], torch.float64)
    batch = toy_batch(2)
    R = residual(objective, wrong, knowing(batch, draws.noise - batch.data), draws)
    assert float(R.abs().mean()) > 0.1


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_self_guidance_settles_at_one_over_one_minus_rho(rho: float) -> None:
    objective = TwinFlow(shares=JUMPS, rectify_weight=0.0, guidance=rho, teacher_decay=0.0)
    draws, batch = whole(objective, 6).to("cpu", torch.float64), toy_batch(6)
    v = (draws.noise - batch.data).reshape(6, 1, -1)
    free = normal("free", 6, 1, v.shape[-1])
    guided = Condition(tokens=free + (v - free) / (1 - rho))
    batch = replace(batch, cond=guided, null=Condition(tokens=free))
    assert float(residual(objective, straight, batch, draws).abs().max()) <= 1e-10


def spread(t: Tensor, std: float) -> Tensor:
    """Return the standard deviation of x_t for data N(0, std^2)."""
    return (t**2 + (1 - t) ** 2 * std**2).sqrt()


def gaussian(x_t: Tensor, t: Times, r: Times, std: float) -> Tensor:
    """Return the average velocity from t to r of data N(0, std^2), in closed form."""
    t, r = (time.reshape(-1, *[1] * (x_t.ndim - 1)) for time in (t, r))
    diagonal = (t - (1 - t) * std**2) / spread(t, std) ** 2
    gap = torch.where(t == r, 1.0, t - r)
    return x_t * torch.where(t == r, diagonal, (1 - spread(r, std) / spread(t, std)) / gap)


def gaussian_residual(order: int, grid: bool, std: float, *, average: bool) -> Tensor:
    """Return mean |R| of every (t, r): of the exact field, or of its diagonal everywhere."""

    def field(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return gaussian(x_t, t, r if average else t, std)

    where = [(t / 25, part / 10) for t in range(1, 26) for part in range(11)]
    objective = jumping(order, grid)
    draws = chosen(objective, where, torch.float64, latent=(40,))
    t = draws.t[:, None]
    # The mean of R over data and noise that meet in x_t, because R is linear in their velocity.
    x_t = spread(t, std) * torch.special.ndtri(torch.linspace(0, 1, 42).double()[1:-1])
    v = gaussian(x_t, draws.t, draws.t, std)
    cond = toy_batch(len(where)).cond
    batch = Batch(data=x_t - t * v, cond=cond, null=cond, keys=("",) * len(where))
    return residual(objective, field, batch, replace(draws, noise=x_t + (1 - t) * v)).abs().mean(1)


@pytest.mark.parametrize("std", [0.5, 1.0])
@pytest.mark.parametrize(("order", "grid"), [(1, False), (2, False), (3, False), (3, True)])
def test_the_exact_gaussian_field_leaves_almost_no_residual(
    order: int, grid: bool, std: float
) -> None:
    assert float(gaussian_residual(order, grid, std, average=True).max()) <= 0.02
    assert float(gaussian_residual(order, grid, std, average=False).max()) > 0.1


class Slopes(nn.Module):
    """A velocity linear in x_t, its coefficients a perceptron of both times and of the sign."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner = (nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
            self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), *inner)

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        times = torch.stack([t.abs(), t.abs() - r.abs(), t.square(), 4 * t.sign()], -1)
        slope, offset = self.layers(times).T
        return slope[:, None] * x_t + offset[:, None]


@torch.no_grad()
def errors(net: nn.Module, std: float) -> tuple[float, float, float]:
    """Return the root mean square error at all times and at (1, 0), and mean |delta_v|."""
    t, part = torch.cartesian_prod(torch.linspace(0.1, 1, 10), torch.linspace(0, 1, 6)).T
    r, cond = t * part, Condition(tokens=torch.zeros(60, 1, 1))
    x_t = spread(t, std)[:, None] * torch.linspace(-2, 2, 21)
    wrong = (net(x_t, t, r, cond) - gaussian(x_t, t, r, std)).square()
    delta_v = (net(x_t, -t, -t, cond) - net(x_t, t, t, cond)).abs().mean()
    one_step = wrong[(t == 1) & (r == 0)].mean().sqrt()
    return float(wrong.mean().sqrt()), float(one_step), float(delta_v)


def test_training_on_a_gaussian_finds_its_average_velocities_and_closes_the_game() -> None:
    std, rows, pixels, steps = 0.5, 32, 64, 800
    # Every pixel is a sample of its own, so that a row has many at its pair of times.
    objective = TwinFlow(
        guidance=0.0, distance=l2(), time_weight=False, teacher_decay=0.0, delta=0.05
    )
    net, cond = Slopes(), Condition(tokens=torch.zeros(rows, 1, 1))
    adam = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    before = errors(net, std)
    for step in range(steps):
        data = torch.randn(rows, pixels, generator=generator("test", "gaussian", step)) * std
        batch = Batch(data=data, cond=cond, null=cond, keys=("",) * rows)
        adam.zero_grad()
        draws = whole(objective, rows, step=step, latent=(pixels,))
        objective.loss(net, net, batch, draws).total.backward()
        # The generated data feeds back: unclipped, one large step in hundreds can run away.
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        adam.step()
        rate.step()
    after = errors(net, std)
    assert min(before) > 0.15
    assert max(after) < 0.08


def rectification(net: Velocity) -> Tensor:
    """Return the clamped delta_v of the generator rows."""
    kept = Kept(alpha=2.0)
    objective = TwinFlow(distance=kept, guidance=0.0)
    objective.loss(net, net, toy_batch(8), whole(objective, 8))
    return kept.found[1]


def test_delta_v_is_fake_minus_real_and_clamped() -> None:
    def by_sign(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return torch.ones_like(x_t) * (0.2 * t.sign()).reshape(-1, 1, 1, 1)

    def far(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return -10 * by_sign(x_t, t, r, cond)

    torch.testing.assert_close(rectification(by_sign), torch.full((2, *LATENT), -0.4).double())
    torch.testing.assert_close(rectification(far), torch.ones(2, *LATENT).double())


class Even(nn.Module):
    """The network at |times|: its fake branch is its real one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        return self.net(x_t, t.abs(), r.abs(), cond)


def test_equal_branches_make_the_rectification_vanish() -> None:
    net = Even()
    parameters = list(net.parameters())
    assert not rectification(net).any()
    assert rectification(net.net).any()
    objective = TwinFlow(rectify_weight=5.0)
    draws = whole(objective, 8)
    found = [
        gradients(replace(objective, rectify_weight=w).loss(net, net, toy_batch(8), draws).total,
                  parameters)
        for w in (5.0, 0.0)
    ]  # fmt: skip
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-12, atol=1e-14)


def test_the_rectification_pulls_a_different_branch() -> None:
    net, batch, draws = network(), toy_batch(8), whole(TwinFlow(), 8)
    found = [
        gradients(TwinFlow(rectify_weight=w).loss(net, net, batch, draws).total,
                  list(net.parameters()))
        for w in (5.0, 0.0)
    ]  # fmt: skip
    assert all(not a.allclose(b) for a, b in zip(*found, strict=True))


def test_image_free_training_never_looks_at_the_data() -> None:
    objective, batch = presets.twinflow_image_free(), toy_batch(8)
    other = replace(batch, data=torch.full_like(batch.data, 1e6))
    draws = whole(objective, 8)
    ours, theirs = (objective.loss(network(), network(1), b, draws).total for b in (batch, other))
    assert ours.equal(theirs)


def test_fake_rows_never_look_at_the_data() -> None:
    objective, batch = TwinFlow(), toy_batch(8)
    data = batch.data.clone()
    data[6:] = 1e6
    draws = whole(objective, 8)
    ours, theirs = (
        objective.loss(network(), network(1), b, draws).total
        for b in (batch, replace(batch, data=data))
    )
    assert ours.equal(theirs)


def test_with_order_0_only_local_and_fake_rows_are_averaged() -> None:
    objective = TwinFlow(order=0, shares=Shares(jump=0), guidance=0.0)
    batch, draws = toy_batch(9), whole(objective, 9)
    data = batch.data.clone()
    data[:3] = 1e6  # the generator rows
    ours, theirs = (
        objective.loss(network(), network(), b, draws).total
        for b in (batch, replace(batch, data=data))
    )
    assert ours.equal(theirs)
    plainly = replace(objective, distance=l2(), time_weight=False)
    terms = plainly.loss(nothing, nothing, batch, draws).terms
    found = float(terms["base"] + terms["fake"])
    v = draws.noise.double() - batch.data
    v[6:] = draws.noise[6:].double() - draws.noise_fake
    assert found == pytest.approx(float(v[3:].square().mean()))


def test_separate_means_weigh_one_to_one_to_one() -> None:
    objective = replace(presets.twinflow_paper(), guidance=0.0)
    loss = objective.loss(network(), network(1), toy_batch(12), whole(objective, 12))
    told = {key: value.item() for key, value in loss.metrics.items()}
    assert objective.shares.counts(12)["jump"] == 8
    terms = told["loss/jump"] + told["loss/fake"] + told["loss/rectify"]
    assert loss.total.item() == pytest.approx(terms)


@pytest.mark.parametrize("nulls", [1, 9])
def test_unconditional_rows_get_the_null_condition_and_no_others_do(nulls: int) -> None:
    seen: list[Tensor] = []

    def watch(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        seen.append(cond.tokens)
        return torch.zeros_like(x_t)

    objective = replace(presets.flow_matching(), null_share=0.5)
    batch, draws = toy_batch(9, nulls=nulls), whole(objective, 9)
    assert 0 < int(draws.unconditional.sum()) < 9
    objective.loss(watch, watch, batch, draws)
    (tokens,) = seen
    for i, unconditional in enumerate(draws.unconditional.tolist()):
        expected = batch.null.tokens[i % nulls] if unconditional else batch.cond.tokens[i]
        assert tokens[i].equal(expected)


def in_bfloat16(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
    """Compute in bfloat16 and answer in the type of x_t, as a large network does."""
    assert t.dtype == r.dtype == x_t.dtype == torch.float32
    h = x_t.bfloat16() * (1 + t - r / 2).bfloat16().reshape(-1, 1, 1, 1)
    return (h + cond.tokens.bfloat16().mean((1, 2)).reshape(-1, 1, 1, 1)).to(x_t.dtype)


edges = st.sampled_from([0.0, 1e-9, 0.01, 0.010000001, 0.5, 0.999999, 1.0])


@given(
    st.sampled_from(["twinflow", "paper", "image_free", "all_roles", "order0", "lora_order1"]),
    st.lists(st.tuples(edges, edges), min_size=14, max_size=14),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=80)
def test_no_time_and_no_precision_gives_nan(
    name: str, where: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    objective, batch = VARIANTS[name], toy_batch(14, dtype=dtype)
    draws = whole(objective, 14)
    # Every role at every time, whatever it would draw itself.
    t, part = torch.tensor(where).T.contiguous()
    fake = torch.arange(14) >= draws.roles["fake"].start
    r = torch.where(fake, t, t * part)
    draws = replace(draws, t=t, r=r, tau=t[: len(draws.tau)])
    draws = replace(draws, recurse=((t - r >= objective.delta) & ~fake & (objective.order > 0))
                    .nonzero().flatten())  # fmt: skip
    scale = torch.ones((), requires_grad=True)
    net = network() if dtype == torch.float64 else in_bfloat16

    def student(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        return scale * net(x_t, t, r, cond)

    loss = objective.loss(student, net, batch, draws)
    loss.total.backward()
    assert loss.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(loss.total.isfinite())
    assert scale.grad is not None
    assert bool(scale.grad.isfinite())
    assert all(bool(value.isfinite()) for value in loss.metrics.values())


def tensors(*holders: object) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in some dataclasses, with its name."""
    for holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, Condition):
                yield from tensors(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_of_the_callers_is_written_to(name: str, dtype: torch.dtype) -> None:
    objective, batch = VARIANTS[name], toy_batch(12, nulls=12, dtype=dtype)
    draws = whole(objective, 12).to("cpu", dtype)  # so that nothing has to be copied on the way
    student, teacher = network(0).to(dtype), network(1).to(dtype)
    before = [(key, value.clone(), value._version) for key, value in tensors(batch, draws)]
    objective.loss(student, teacher, batch, draws).total.backward()
    after = list(tensors(batch, draws))
    for (key, value, version), (_, now) in zip(before, after, strict=True):
        assert now._version == version, key
        assert now.equal(value), key
    assert all(p.grad is None for p in teacher.parameters())


def test_no_global_randomness_is_used() -> None:
    student, teacher = network(0), network(1)
    ours, numpys = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    for objective in VARIANTS.values():
        draws = whole(objective, 12)
        objective.loss(student, teacher, toy_batch(12), draws).total.backward()
    assert torch.get_rng_state().equal(ours)
    assert str(np.random.get_state()) == numpys  # noqa: NPY002


def test_the_same_draws_give_the_same_loss_twice() -> None:
    objective = TwinFlow()
    first, second = (
        objective.loss(network(0), network(1), toy_batch(8), whole(objective, 8)).total
        for _ in range(2)
    )
    assert first.equal(second)


def test_nothing_warns_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = TwinFlow()
        objective.loss(network(0), network(1), toy_batch(8), whole(objective, 8))
