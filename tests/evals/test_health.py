"""What is told of the game's health: against networks whose health is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.evals import digits
from tests.evals.conftest import Real
from tests.helpers import spawn
from twinflow_train.batch import Condition, Velocity
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals.health import Health
from twinflow_train.evals.heldout import heldout_loss
from twinflow_train.evals.suite import Judged

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def measure(
    heldout: ShardSet,
    student: Velocity,
    teacher: Velocity,
    *,
    delta: float = 0.01,
    order: int = 2,
) -> dict[str, float]:
    health = Health(
        student=student, teacher=teacher, delta=delta, order=order, dtype=torch.bfloat16
    )
    return health.measure(heldout, ALONE)


def scaled(by: float) -> Velocity:
    """A velocity along x_t: the teacher's distance and the two steps are known in closed form."""

    def velocity(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        return by * x_t

    return velocity


def test_a_teacher_is_as_far_as_it_is(real: Real) -> None:
    found = measure(real.heldout, scaled(0.5), scaled(0.4))
    assert found["health/teacher_distance"] == pytest.approx(0.25, rel=1e-5)


def test_a_student_that_is_its_own_teacher_has_no_distance_to_tell(real: Real) -> None:
    student = scaled(0.5)
    assert set(measure(real.heldout, student, student)) == {
        "health/two_step_gap",
        "health/noise_floor",
    }


def test_two_half_jumps_of_a_linear_field_are_known(real: Real) -> None:
    # One jump leaves (1 - k) z, two half jumps (1 - k / 2)^2 z.
    found = measure(real.heldout, scaled(0.5), scaled(0.4))
    assert found["health/two_step_gap"] == pytest.approx((0.75**2 - 0.5) / 0.75**2, rel=1e-4)


def test_an_average_velocity_has_no_gap(real: Real) -> None:
    def exact(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        """The average velocity of dx/dt = x: (x_t - x_r) / (t - r), with x_r = x_t e^(r - t)."""
        part = torch.where(t == r, 1.0, -torch.expm1(r - t) / (t - r).clamp(min=1e-9))
        return part.reshape(-1, 1, 1, 1) * x_t

    found = measure(real.heldout, exact, scaled(1.0))
    assert found["health/two_step_gap"] < 1e-5
    assert found["health/teacher_distance"] < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_the_noise_floor_is_what_rounding_adds_to_the_residual(real: Real, order: int) -> None:
    def rounding(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        # As noise that a half unit's change of the input does not share: a true rounding is one.
        return (6400 * x_t).sin() * 2.0**-9

    # Each pass rounds on its own: R = (F - mean of the N jumps) / delta.
    true = 2.0**-9 * 0.5**0.5 * (1 + 1 / order) ** 0.5 / 0.01
    found = measure(real.heldout, rounding, scaled(1.0), order=order)["health/noise_floor"]
    assert found == pytest.approx(true, rel=0.35)
    wide = measure(real.heldout, rounding, scaled(1.0), order=order, delta=0.1)
    assert wide["health/noise_floor"] == pytest.approx(true / 10, rel=0.35)
    exact = measure(real.heldout, scaled(0.0), scaled(1.0), order=order)
    assert exact["health/noise_floor"] == 0


def test_without_a_recursion_there_is_no_floor(real: Real) -> None:
    assert "health/noise_floor" not in measure(real.heldout, scaled(0.5), scaled(0.4), order=0)


def test_a_silent_teacher_has_no_distance_to_tell(real: Real) -> None:
    assert "health/teacher_distance" not in measure(real.heldout, scaled(0.5), scaled(0.0))


def on_rank(world: World, folder: Path) -> dict[str, float]:
    health = Health(
        student=digits.Linear.make(3),
        teacher=digits.Linear.make(4),
        delta=0.01,
        order=2,
        dtype=torch.float,
    )
    return health.measure(ShardSet(folder), world)


def test_of_prompts_alone_the_same_is_told(real: Real, tmp_path: Path) -> None:
    """On images of the student's own; there is no held-out loss."""
    samples = [real.heldout.read(n) for n in range(len(real.heldout))]
    prompts = write_shards(
        tmp_path / "prompts",
        [replace(sample, latent=None) for sample in samples],
        null=real.heldout.null.tokens[0],
        about=real.heldout.manifest.about,
        latent_shape=real.heldout.latent_shape,
    )
    found = measure(prompts, scaled(0.5), scaled(0.4))
    known = measure(real.heldout, scaled(0.5), scaled(0.4))
    assert found == pytest.approx(known, rel=1e-4)
    assert heldout_loss(scaled(0.5), prompts, ALONE, samples=12, batch=4, seed=0) == {}
    with pytest.raises(UserError, match=r"evals\.judge judges images, and"):
        Judged(judge=str(real.judge)).check(prompts)


def test_ranks_change_nothing(real: Real) -> None:
    (alone,) = spawn(on_rank, 1, real.heldout.folder)
    for found in spawn(on_rank, 2, real.heldout.folder):
        assert found == pytest.approx(alone, rel=1e-4)
