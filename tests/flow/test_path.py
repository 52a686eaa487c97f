import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.flow.tools import normal
from twinflow_train.flow.path import expand, interpolate, jump, recover

SHAPE = (3, 2, 4, 4)
TIME = st.floats(-1, 1)


def _pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal("data", *SHAPE).to(dtype), normal("noise", *SHAPE).to(dtype)


def test_expand_adds_the_trailing_axes() -> None:
    t = torch.tensor([0.1, 0.2, 0.3])
    assert expand(t, torch.zeros(SHAPE)).shape == (3, 1, 1, 1)
    assert expand(t, torch.zeros(3, 7)).shape == (3, 1)
    assert expand(t, torch.zeros(3)).shape == (3,)


@given(TIME)
def test_the_true_velocity_recovers_data_and_noise(time: float) -> None:
    data, noise = _pair()
    t = torch.full((3,), time, dtype=torch.float64)
    x_hat, z_hat = recover(interpolate(data, noise, t), noise - data, t)
    torch.testing.assert_close(x_hat, data, rtol=0, atol=1e-14)
    torch.testing.assert_close(z_hat, noise, rtol=0, atol=1e-14)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_jump_is_the_recovered_line_at_its_end(t: float, share: float) -> None:
    x_t, F = _pair()
    now = torch.full((3,), t, dtype=torch.float64)
    then = now * share
    line = interpolate(*recover(x_t, F, now), then)
    torch.testing.assert_close(jump(x_t, F, now, then), line, rtol=0, atol=1e-14)


def test_the_ends_are_exact_and_the_sign_of_time_is_ignored() -> None:
    data, noise = _pair()
    for sign in (1.0, -1.0):
        assert interpolate(data, noise, torch.full((3,), sign)).equal(noise)
        assert interpolate(data, noise, torch.full((3,), sign * 0.0)).equal(data)
    t = torch.tensor([0.25, 0.5, 0.999])
    assert interpolate(data, noise, -t).equal(interpolate(data, noise, t))
    assert all(
        a.equal(b) for a, b in zip(recover(data, noise, -t), recover(data, noise, t), strict=True)
    )


def test_each_row_has_its_own_time() -> None:
    data, noise = _pair()
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x_t = interpolate(data, noise, t)
    assert x_t[0].equal(data[0])
    assert x_t[1].equal(0.5 * noise[1] + 0.5 * data[1])
    assert x_t[2].equal(noise[2])


def test_low_precision_rounds_only_the_result() -> None:
    data, noise = _pair(torch.bfloat16)
    t = torch.full((3,), 0.999)
    wide = interpolate(data.double(), noise.double(), t)
    assert interpolate(data, noise, t).dtype == torch.bfloat16
    assert interpolate(data, noise, t).equal(wide.to(torch.bfloat16))
    low = torch.full((3,), 0.9375, dtype=torch.bfloat16)
    data, noise = _pair(torch.float32)
    assert interpolate(data, noise, low).equal(interpolate(data, noise, low.float()))


def test_arguments_are_not_written_to() -> None:
    data, noise = _pair()
    t, r = torch.tensor([-0.5, 0.5, 1.0]), torch.tensor([0.0, 0.2, 0.3])
    before = [a.clone() for a in (data, noise, t, r)]
    interpolate(data, noise, t)
    recover(data, noise, t)
    jump(data, noise, t, r)
    assert all(a.equal(b) for a, b in zip((data, noise, t, r), before, strict=True))
