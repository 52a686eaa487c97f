from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from tests.flow.tools import normal
from tests.golden.record import CASES, tensor, tensors
from tests.golden.toynet import ConvNet
from twinflow_train.batch import Condition, Velocity
from twinflow_train.errors import UserError
from twinflow_train.flow.path import expand
from twinflow_train.flow.sampler import Sampler, Style, grid, sample, trajectory

SETTINGS = {
    (Style.few, 1): Sampler(),
    (Style.few, 2): Sampler(steps=2, stochasticity=1.0, end_gap=0.6),
    (Style.few, 4): Sampler(steps=4, stochasticity=1.0, end_gap=0.5),
    (Style.any, 4): Sampler(steps=4, style=Style.any, end_gap=0.5),
    (Style.any, 8): Sampler(steps=8, style=Style.any, end_gap=0.5),
    (Style.multi, 30): Sampler(steps=30, style=Style.multi, kumaraswamy=[1.17, 0.8, 1.1]),
}
"""The published settings."""
PUBLISHED = list(SETTINGS)


def conditions(rows: int, value: float = 0.0) -> Condition:
    return Condition(tokens=torch.full((rows, 1, 1), value))


@dataclass
class Recorder:
    """Passes calls on and keeps their rows, times and types."""

    velocity: Velocity
    rows: list[int] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    dtypes: set[tuple[torch.dtype, ...]] = field(default_factory=set)

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        assert len(x_t) == len(t) == len(r) == len(cond)
        assert len(t.unique()) == len(r.unique()) == 1
        self.rows.append(len(x_t))
        self.times.append((t[0].item(), r[0].item()))
        self.dtypes.add((x_t.dtype, t.dtype, r.dtype))
        return self.velocity(x_t, t, r, cond)


def wave(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
    """A bounded velocity that depends on everything and treats each pixel alone."""
    shift = cond.tokens[:, 0, 0].to(x_t.dtype)
    return torch.sin(x_t + expand(t + 2 * r + shift, x_t).to(x_t.dtype))


@dataclass(frozen=True)
class Gaussian:
    """The exact velocity field for data of one Gaussian: E[z - x | x_t]."""

    mean: float = 0.7
    std: float = 0.5

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        t = expand(t, x_t)
        variance = t**2 + ((1 - t) * self.std) ** 2
        slope = (t - (1 - t) * self.std**2) / variance
        return slope * (x_t - (1 - t) * self.mean) - self.mean


@given(
    st.fixed_dictionaries(
        {
            "style": st.sampled_from(Style),
            "steps": st.integers(1, 12),
            "stochasticity": st.floats(0, 1),
            "extrapolation": st.floats(0, 1),
            "kumaraswamy": st.lists(st.floats(0.3, 3), min_size=3, max_size=3),
            "start_gap": st.floats(0, 0.99),
            "end_gap": st.just(0.0) | st.floats(1e-3, 0.99),
        }
    )
)
def test_any_setting_runs_forward_and_stays_finite(settings: dict) -> None:
    assume(settings["start_gap"] + settings["end_gap"] < 0.99)
    sampler = Sampler(**settings)
    times = grid(sampler)
    assert times.dtype == torch.float64
    assert len(times) == sampler.steps + 1
    assert 0 < times[0] <= 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    noise = normal("noise", 2, 3)
    kept, network = noise.clone(), Recorder(wave)
    x = sample(network, noise, conditions(2), sampler, eps=lambda k: normal(f"eps{k}", 2, 3))
    assert torch.isfinite(x).all()
    assert noise.equal(kept)
    assert len(network.times) == sampler.nfe


@given(st.floats(0, 1), st.floats(0, 1))
def test_gaps_that_leave_no_time_are_refused(start: float, share: float) -> None:
    end = 1 - start * share
    with pytest.raises(UserError, match=r"sampler\.(start|end)_gap is"):
        Sampler(start_gap=start, end_gap=end, steps=4)


MULTI = {"style": Style.multi}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("steps", {"steps": 0}),
        ("order", {"order": 3, **MULTI}),
        ("order", {"order": 2}),
        ("order", {"order": 2, "style": Style.any}),
        ("order", {"order": 2, "stochasticity": 0.1, **MULTI}),
        ("order", {"order": 2, "extrapolation": 0.1, **MULTI}),
        ("order", {"order": 2, "sde": True, **MULTI}),
        ("stochasticity", {"stochasticity": -0.1}),
        ("stochasticity", {"stochasticity": 1.1}),
        ("stochasticity", {"stochasticity": NAN}),
        ("stochasticity", {"stochasticity": 0.5, "sde": True, **MULTI}),
        ("sde", {"sde": True, "style": Style.any}),
        ("extrapolation", {"extrapolation": INF}),
        ("kumaraswamy", {"kumaraswamy": [1.0, 1.0]}),
        ("kumaraswamy", {"kumaraswamy": [1.0, 0.0, 1.0]}),
        ("kumaraswamy", {"kumaraswamy": [1.0, NAN, 1.0]}),
        ("kumaraswamy", {"kumaraswamy": [40.0, 1.0, 1.0], "steps": 8}),
        ("start_gap", {"start_gap": -0.1}),
        ("start_gap", {"start_gap": 0.5, "end_gap": 0.5}),
        ("end_gap", {"end_gap": 1.0}),
        ("guidance", {"guidance": 2.0}),
        ("guidance", {"guidance": -1.0, **MULTI}),
        ("guidance_low", {"guidance_low": 0.5, "guidance_high": 0.5}),
        ("guidance_high", {"guidance_high": 1.5}),
    ],
)
def test_refuses_what_goes_wrong_silently(key: str, settings: dict) -> None:
    with pytest.raises(
        UserError, match=rf"^sampler\.{key} is .*{settings[key]}".replace("[", r"\[")
    ):
        Sampler(**settings)


def test_is_its_own_configuration() -> None:
    config = OmegaConf.structured(Sampler)
    config = OmegaConf.merge(
        config, OmegaConf.from_dotlist(["style=multi", "steps=3", "kumaraswamy=[1.17,0.8,1.1]"])
    )
    expected = Sampler(style=Style.multi, steps=3, kumaraswamy=[1.17, 0.8, 1.1])
    assert OmegaConf.to_object(config) == expected


@pytest.mark.parametrize(("style", "nfe"), PUBLISHED)
def test_published_settings_cost_what_they_say(style: Style, nfe: int) -> None:
    sampler = SETTINGS[style, nfe]
    assert sampler.style is style
    assert sampler.nfe == nfe
    assert sampler.start_gap == 0.001


@pytest.mark.parametrize("gap", [0.0, 1e-300])
def test_without_a_gap_the_last_step_is_as_long_as_the_others(gap: float) -> None:
    assert grid(Sampler(steps=4, start_gap=0.0, end_gap=gap)).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert grid(Sampler(steps=3, start_gap=0.0, end_gap=0.5)).tolist() == [1, 0.75, 0.5, 0]


@pytest.mark.parametrize("i", range(len(CASES["sampler"])))
def test_equals_the_recorded_runs(i: int) -> None:
    settings = dict(CASES["sampler"][i])
    start, end = settings.pop("gaps")
    sampler = Sampler(
        **settings | {"style": Style[settings["style"]]}, start_gap=start, end_gap=end
    )
    net, bank = ConvNet(), tensor("sampler/eps_bank")
    net.load_state_dict(tensors("sampler/net/"))
    network = Recorder(lambda x_t, t, r, cond: net(x_t, t, r, [cond.tokens[:, 0]]))
    noise, cond = tensor("sampler/noise"), Condition(tokens=tensor("sampler/cond")[:, None])
    with torch.no_grad():
        steps = list(trajectory(network, noise, cond, sampler, eps=lambda k: bank[k]))
    asked = torch.tensor(network.times, dtype=torch.float64)
    recorded = torch.stack([tensor(f"sampler/{i}/t"), tensor(f"sampler/{i}/r")], 1)
    torch.testing.assert_close(asked, recorded, rtol=0, atol=1e-12)
    x_hats = torch.stack([noise, *(step.x_hat for step in steps)])
    torch.testing.assert_close(x_hats, tensor(f"sampler/{i}/x_hats"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("style", "nfe"), PUBLISHED)
def test_a_straight_flow_is_solved_exactly_in_one_step_or_many(style: Style, nfe: int) -> None:
    data, noise = normal("data", 2, 3), normal("noise", 2, 3)

    def straight(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        return (x_t - data) / expand(t, x_t)  # the line from data through x_t

    sampler = replace(SETTINGS[style, nfe], start_gap=0.0)
    x = sample(straight, noise, conditions(2), sampler, eps=lambda k: normal(f"eps{k}", 2, 3))
    torch.testing.assert_close(x, data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_multi_integrates_a_gaussian_to_its_mean_and_std(order: int) -> None:
    field_ = Gaussian()
    noise = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    sampler = Sampler(style=Style.multi, steps=800, order=order, start_gap=0.0)
    x = sample(field_, noise, conditions(7), sampler)
    expected = field_.mean + field_.std * noise
    tolerance = {1: 2e-2, 2: 2e-4}[order]
    torch.testing.assert_close(x, expected, rtol=0, atol=tolerance)


def test_heun_converges_with_the_square_of_the_step() -> None:
    field_ = Gaussian()
    noise = normal("noise", 8, 3)

    def error(steps: int) -> float:
        sampler = Sampler(style=Style.multi, steps=steps, order=2, start_gap=0.0)
        x = sample(field_, noise, conditions(8), sampler)
        return (x - field_.mean - field_.std * noise).abs().max().item()

    errors = [error(2 * n - 1) for n in (40, 80, 160, 320)]
    assert all(3.5 < coarse / fine < 4.5 for coarse, fine in pairwise(errors))


def test_heun_asks_twice_but_for_the_last_step() -> None:
    network = Recorder(wave)
    sampler = Sampler(style=Style.multi, steps=6, order=2)
    sample(network, normal("noise", 2, 3), conditions(2), sampler)
    t = grid(sampler).tolist()
    assert len(t) == 4
    assert network.times == [(time, time) for time in (t[0], t[1], t[1], t[2], t[2])]
    assert sampler.nfe == 5


def test_sde_noise_keeps_the_marginals() -> None:
    field_, noise = Gaussian(), normal("many", 40_000, 1)
    sampler = Sampler(style=Style.multi, steps=200, sde=True, start_gap=0.0)
    steps = trajectory(
        field_,
        noise,
        conditions(len(noise)),
        sampler,
        eps=lambda k: normal(f"eps{k}", *noise.shape),
    )
    for t, step in zip(grid(sampler)[1:].tolist(), steps, strict=True):
        std = (t**2 + ((1 - t) * field_.std) ** 2) ** 0.5
        assert step.x.mean().item() == pytest.approx((1 - t) * field_.mean, abs=0.02)
        assert step.x.std().item() == pytest.approx(std, abs=0.02)
    correlation = torch.corrcoef(torch.cat([noise, step.x], 1).T)[0, 1].item()
    assert abs(correlation) < 0.4  # 1 without fresh noise on the way


def test_sde_share_is_the_variance_that_the_step_needs() -> None:
    sampler = Sampler(style=Style.multi, sde=True)
    assert sampler.share(0.5, 0.4) == pytest.approx(2 * 0.5 * 0.1 / 0.4**2)
    assert sampler.share(1.0, 0.1) == 1
    assert sampler.share(0.1, 0.0) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_guidance_is_the_line_through_both_predictions_inside_its_window(order: int) -> None:
    network = Recorder(wave)
    sampler = Sampler(
        style=Style.multi, steps=9, order=order, guidance=3.0, guidance_low=0.3, guidance_high=0.8
    )
    noise, cond, null = normal("noise", 2, 3), conditions(2, 1.0), conditions(1, -1.0)
    x = sample(network, noise, cond, sampler, null=null)
    assert {rows for rows, (t, _) in zip(network.rows, network.times, strict=True) if t < 0.3} == {
        2
    }
    assert set(network.rows) == {2, 4}
    assert sum(network.rows) == 2 * sampler.nfe

    def guided(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        given, free = wave(x_t, t, r, cond), wave(x_t, t, r, null.expand(2))
        inside = expand(((t >= 0.3) & (t <= 0.8)).to(t.dtype), x_t)
        return torch.where(inside.bool(), free + 3 * (given - free), given)

    plain = sample(guided, noise, cond, replace(sampler, guidance=1.0))
    torch.testing.assert_close(x, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "sampler",
    [SETTINGS[Style.few, 4], Sampler(style=Style.multi, steps=6, sde=True)],
    ids=["few", "sde"],
)
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    def run(rows: list[int]) -> Tensor:
        def eps(k: int) -> Tensor:
            return torch.stack([normal(f"eps {row} {k}", 5) for row in rows])

        noise = torch.stack([normal(f"noise {row}", 5) for row in rows])
        return sample(wave, noise, conditions(len(rows)), sampler, eps=eps)

    together = run([0, 1, 2, 3])
    assert run([0, 1, 2, 3]).equal(together)
    assert torch.cat([run([3]), run([0])]).equal(together[[3, 0]])
    assert run([2, 1]).equal(together[[2, 1]])


def test_noise_is_asked_for_once_a_stochastic_step() -> None:
    asked: list[int] = []

    def eps(k: int) -> Tensor:
        asked.append(k)
        return normal(f"eps{k}", 2, 3)

    sample(wave, normal("noise", 2, 3), conditions(2), SETTINGS[Style.few, 4], eps=eps)
    assert asked == [0, 1, 2]


def test_what_a_setting_needs_is_named() -> None:
    noise, cond = normal("noise", 2, 3), conditions(2)
    with pytest.raises(ValueError, match=r"sampler\.stochasticity"):
        sample(wave, noise, cond, SETTINGS[Style.few, 2])
    with pytest.raises(ValueError, match=r"sampler\.guidance is 2\.0"):
        sample(wave, noise, cond, Sampler(style=Style.multi, guidance=2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_network_sees_the_type_of_the_noise_and_precise_times(dtype: torch.dtype) -> None:
    network, noise = Recorder(wave), normal("noise", 2, 3).to(dtype)
    x = sample(network, noise, conditions(2), SETTINGS[Style.multi, 30])
    times = torch.float64 if dtype == torch.float64 else torch.float32
    assert network.dtypes == {(dtype, times, times)}
    assert x.dtype == dtype
    assert not x.requires_grad


def test_the_state_gathers_no_rounding() -> None:
    def constant(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        return torch.full_like(x_t, 0.75)

    noise = normal("noise", 100, 10).float()
    sampler = Sampler(style=Style.multi, steps=300, start_gap=0.0)
    *_, last = trajectory(constant, noise, conditions(100), sampler)
    torch.testing.assert_close(last.x, noise.double() - 0.75, rtol=0, atol=1e-13)
