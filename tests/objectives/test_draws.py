"""Draws: pure functions of (seed, step, sample), distributed as stated, no two alike."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from tests.objectives.toys import LATENT, whole
from twinflow_train.deal import Deal
from twinflow_train.draws import Draws
from twinflow_train.objectives import presets
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow

FULL = TwinFlow(shares=Shares(direct=1), order=3, random_grid=True, null_share=0.5, time_alpha=0.7)
PER_ROW = ("t", "r", "noise", "grid", "unconditional")
PER_NEED = {"noise_fake": "generate", "noise_rectify": "rectify", "tau": "rectify"}
JUMPS = Shares(generator=0, local=0, fake=0)


def by_sample(draws: Draws, index: Tensor) -> dict[tuple[str, int], Tensor]:
    """Take draws apart: (what, index in the global batch) to its values."""
    found: dict[tuple[str, int], Tensor] = {}
    for name in PER_ROW:
        found |= {(name, i): row for i, row in zip(index.tolist(), vars(draws)[name], strict=True)}
    for name, need in PER_NEED.items():
        rows = index[vars(draws)[need]].tolist()
        found |= {(name, i): row for i, row in zip(rows, vars(draws)[name], strict=True)}
    for name in ("generate", "guide", "recurse", "rectify"):
        rows = index[vars(draws)[name]].tolist()
        found |= {(name, i): torch.tensor(1) for i in rows}
    return found


@given(
    st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (3, 1), (2, 6), (12, 1)]),
    st.integers(0, 2**31),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=10)
def test_a_samples_draws_depend_only_on_seed_step_and_index(
    sizes: tuple[int, int], seed: int, step: int
) -> None:
    ranks, micro_batch = sizes
    one = Deal(batch=12, micro_batch=12, ranks=1, rank=0)
    expected = by_sample(FULL.draw(one, 0, seed=seed, step=step, latent=(2,)), torch.arange(12))
    found: dict[tuple[str, int], Tensor] = {}
    for rank in range(ranks):
        deal = Deal(batch=12, micro_batch=micro_batch, ranks=ranks, rank=rank)
        for micro in range(deal.micro_steps):
            draws = FULL.draw(deal, micro, seed=seed, step=step, latent=(2,))
            found |= by_sample(draws, deal.mine(micro))
    assert found.keys() == expected.keys()
    assert all(found[key].equal(value) for key, value in expected.items())


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (1, 0)])
def test_another_seed_or_step_draws_anew(seed: int, step: int) -> None:
    deal = Deal(batch=10, micro_batch=10, ranks=1, rank=0)
    first = FULL.draw(deal, 0, seed=0, step=0, latent=LATENT)
    other = FULL.draw(deal, 0, seed=seed, step=step, latent=LATENT)
    for name in ("noise", "noise_fake", "noise_rectify", "tau", "grid"):
        assert not (vars(first)[name] == vars(other)[name]).any(), name
    real = slice(2, 10)  # generator rows are at (1, 0) always
    assert not (first.t[real] == other.t[real]).any()


def test_no_two_draws_of_noise_are_alike() -> None:
    rows = [
        row
        for step in range(3)
        for draws in [whole(FULL, 10, step=step)]
        for row in (*draws.noise, *draws.noise_fake, *draws.noise_rectify)
    ]
    assert len(rows) == 3 * (10 + 2 + 2)
    assert all(not (a == b).any() for a, b in combinations(rows, 2))


def test_uniform_draws_of_different_purposes_are_unrelated() -> None:
    everything = TwinFlow(
        shares=Shares(local=0, fake=1, generator=1), random_grid=True, stratified=False
    )
    draws = whole(everything, 6000, latent=(1,))
    jump, rectify = draws.roles["jump"], draws.rectify
    gap = (1 - draws.r / draws.t)[jump]
    pairs = [
        (draws.t[jump], gap),
        (draws.t[jump], draws.grid[jump, 0]),
        (gap, draws.grid[jump, 0]),
        (draws.tau, draws.grid[rectify, 0]),
        (draws.t[jump], draws.t[draws.roles["fake"]]),
    ]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


def test_noise_is_standard_normal_and_tau_uniform() -> None:
    draws = whole(TwinFlow(), 2000, latent=(2,))
    for name in ("noise", "noise_fake", "noise_rectify"):
        assert kstest(vars(draws)[name].flatten().numpy(), "norm").pvalue > 1e-3, name
    assert kstest(draws.tau.numpy(), "uniform").pvalue > 1e-3
    assert draws.tau.min() >= 0
    assert draws.tau.max() <= 1


@pytest.mark.parametrize("role", ["local", "jump", "direct", "fake"])
@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 0.5), (0.8, 1.7)])
def test_times_have_the_beta_distribution(role: str, stratified: bool, a: float, b: float) -> None:
    objective = TwinFlow(shares=Shares(direct=1), time_alpha=a, time_beta=b, stratified=stratified)
    t = whole(objective, 5000, latent=(1,)).t
    roles = objective.table(5000, seed=7, step=0).slices(torch.arange(5000))
    drawn = t[roles[role]].double().numpy()
    found = kstest(drawn, "beta", (a, b))
    assert found.pvalue > 1e-3
    # Strata leave a distance of at most one stratum; independent draws have a larger one.
    assert (found.statistic <= 1.001 / len(drawn)) == stratified


@pytest.mark.parametrize("stratified", [True, False])
def test_each_samples_time_alone_has_the_beta_distribution(stratified: bool) -> None:
    objective = TwinFlow(
        shares=JUMPS, rectify_weight=0, time_alpha=2.0, time_beta=3.0, stratified=stratified
    )
    times = torch.stack([objective.table(4, seed=0, step=s).t for s in range(600)]).double()
    for sample in times.T:
        assert kstest(sample.numpy(), "beta", (2.0, 3.0)).pvalue > 1e-3


def test_jumps_go_anywhere_below_t() -> None:
    objective = TwinFlow(shares=JUMPS, rectify_weight=0)
    draws = whole(objective, 3000, latent=(1,))
    assert kstest((1 - draws.r / draws.t).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kappa", [0.0, 0.03, 0.4, 1.0])
def test_times_of_each_role_are_the_methods(kappa: float) -> None:
    objective = TwinFlow(shares=Shares(direct=1), consistency_ratio=kappa)
    draws = whole(objective, 2000, latent=(1,))
    t = {role: draws.t[rows] for role, rows in draws.roles.items()}
    r = {role: draws.r[rows] for role, rows in draws.roles.items()}
    part = {role: (t[role] - r[role]) / t[role] for role in t}
    assert bool(((draws.r >= 0) & (draws.r <= draws.t) & (draws.t <= 1)).all())
    assert bool((t["generator"] == 1).all())
    assert bool((r["generator"] == 0).all())
    assert bool((r["direct"] == 0).all())
    assert bool((t["direct"] > 0).any())
    assert r["fake"].equal(t["fake"])
    for role, most in (("local", min(0.05, kappa)), ("jump", kappa)):
        assert float(part[role].max()) <= most + 1e-4
        assert float(part[role].max()) >= 0.97 * most


def test_needs_are_the_methods() -> None:
    objective = TwinFlow(guidance_low=0.2, guidance_high=0.7, delta=0.1)
    table = objective.table(400, seed=7, step=0)
    index = torch.arange(400)
    fake, real = index >= 300, index < 300
    assert table.needs["generate"].equal(fake)
    assert table.needs["rectify"].equal(index < 100)
    assert table.needs["recurse"].equal(real & (table.t - table.r >= 0.1))
    assert table.needs["guide"].equal(real & (table.t > 0.2) & (table.t < 0.7))


def test_rows_that_no_mean_counts_need_no_pass_of_the_base_loss() -> None:
    needs = presets.twinflow_paper().table(60, seed=7, step=0).needs
    generators = torch.arange(60) < 10
    assert needs["rectify"].equal(generators)
    assert not (needs["recurse"] | needs["guide"])[generators].any()
    assert needs["recurse"].any()
    assert needs["guide"].any()


def test_the_guidance_window_is_open() -> None:
    plain = TwinFlow(shares=JUMPS, rectify_weight=0)
    t = plain.table(16, seed=7, step=0).t.sort().values.tolist()
    low, high = t[3], t[12]
    table = replace(plain, guidance_low=low, guidance_high=high).table(16, seed=7, step=0)
    assert sorted(table.t[table.needs["guide"]].tolist()) == t[4:12]
    around = replace(plain, guidance_low=low - 1e-6, guidance_high=high + 1e-6)
    wider = around.table(16, seed=7, step=0)
    assert sorted(wider.t[wider.needs["guide"]].tolist()) == t[3:13]


def test_the_generator_is_never_guided_with_the_default_window() -> None:
    assert not TwinFlow().table(8, seed=0, step=0).needs["guide"][:2].any()


def test_unguided_and_unrectified_steps_need_no_such_pass() -> None:
    table = TwinFlow(guidance=0.0, rectify_weight=0.0).table(8, seed=0, step=0)
    assert not table.needs["guide"].any()
    assert not table.needs["rectify"].any()
    flow = TwinFlow(order=0, shares=Shares(jump=0)).table(9, seed=0, step=0)
    assert not flow.needs["recurse"].any()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_grid_is_even_or_drawn_in_order(order: int) -> None:
    shares = Shares(jump=0 if order == 0 else 1)
    even = whole(TwinFlow(order=order, shares=shares), 8)
    inner = max(1, order)
    assert even.grid.shape == (8, inner - 1)
    for row in even.grid:
        assert row.tolist() == pytest.approx([k / inner for k in range(1, inner)])
    drawn = whole(TwinFlow(order=order, shares=shares, random_grid=True), 600, latent=(1,)).grid
    assert bool((drawn.diff(dim=1) >= 0).all())
    if order > 1:
        assert drawn.unique().numel() > 0.9 * drawn.numel()
    if order == 2:
        assert kstest(drawn[:, 0].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_only_local_rows_train_the_null_prompt(share: float) -> None:
    draws = whole(TwinFlow(null_share=share), 4000, latent=(1,))
    local = draws.unconditional[draws.roles["local"]]
    assert float(local.double().mean()) == pytest.approx(share, abs=0.05)
    assert int(local.sum()) == int(draws.unconditional.sum())


def test_every_draw_is_float32_and_moving_keeps_what_is_no_number() -> None:
    draws = whole(FULL, 10)
    moved = draws.to("cpu", torch.float64)
    for name, value in vars(draws).items():
        if isinstance(value, Tensor):
            assert value.dtype in (torch.float32, torch.bool, torch.int64), name
            there = vars(moved)[name]
            expected = torch.float64 if value.dtype == torch.float32 else value.dtype
            assert there.dtype == expected, name
            assert there.to(value.dtype).equal(value), name
    assert moved.roles == draws.roles
    assert draws.t.dtype == torch.float32
