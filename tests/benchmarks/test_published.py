"""The baseline is the published step: recorded runs, our own loss, and what it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.published import Published, PublishedDraws
from tests.golden.record import CASES, tensor, tensors
from tests.objectives.test_golden import close, gradient, networks
from tests.objectives.tools import batch_of, draws_of, objective_of
from tests.objectives.toys import (
    LATENT,
    Counting,
    gradients,
    network,
    normal,
    nothing,
    toy_batch,
    whole,
)
from twinflow_train.batch import Batch
from twinflow_train.draws import Draws
from twinflow_train.flow.losses import Distance, l2
from twinflow_train.objectives.twinflow import TwinFlow

RECORDED = {
    case["name"]: case["config"]
    for case in CASES["train"]
    if case["config"]["order"] == 2
    and case["config"]["variant"] == "full"
    and case["config"]["batch"] % 4 == 0
    and case["config"]["ema_decay"] < 1
    and case["config"]["consistency_ratio"] == 1
    and case["config"]["guidance_window"] == [0.0, 1.0]
    and case["config"]["shares"] is None
    and case["config"]["dtype"] == "float64"
    and not case["config"]["image_free"]
}


def published_of(objective: TwinFlow) -> Published:
    """Return the plain step with the settings of our objective."""
    return Published(
        distance=objective.distance,
        guidance=objective.guidance,
        rectify_weight=objective.rectify_weight,
        delta=objective.delta,
    )


def plain_draws(draws: Draws) -> PublishedDraws:
    """Return the same draws for the plain step."""
    draws = draws.to("cpu", torch.float64)
    return PublishedDraws(
        t=draws.t,
        r=draws.r,
        z=draws.noise,
        z_fake=draws.noise_fake,
        z_again=draws.noise_rectify,
        tau=draws.tau,
    )


@pytest.mark.parametrize("name", RECORDED)
def test_it_gives_the_recorded_loss_and_gradient(name: str) -> None:
    config: dict[str, Any] = RECORDED[name]
    objective = objective_of(config)
    student, teacher = networks(name, config)
    draws = plain_draws(draws_of(name, 0, objective, config["batch"]))
    loss = published_of(objective).loss(student, teacher, batch_of(name), draws)
    close(loss, tensor(f"{name}/step0/out/loss"), 1e-7)
    recorded = tensors(f"{name}/step0/grad/")
    for key, found in gradient(student.net, loss).items():
        close(found, recorded[key], 1e-6)


def test_several_recorded_steps_are_compared() -> None:
    assert len(RECORDED) >= 4, sorted(RECORDED)


@pytest.mark.parametrize("distance", [Distance(), l2()], ids=["barron", "l2"])
@pytest.mark.parametrize("step", range(3))
def test_with_the_same_draws_our_loss_is_the_same(distance: Distance, step: int) -> None:
    objective = TwinFlow(distance=distance)
    student, teacher, batch = network(0), network(1), toy_batch(16)
    draws = whole(objective, 16, step=step)
    ours = objective.loss(student, teacher, batch, draws).total
    theirs = published_of(objective).loss(student, teacher, batch, plain_draws(draws))
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=0)
    parameters = list(student.parameters())
    for found, expected in zip(
        gradients(theirs, parameters), gradients(ours, parameters), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_its_own_draws_are_those_of_the_roles() -> None:
    draws = Published().draw(64, seed=3, step=5, latent=LATENT)
    generators, local, jump, fake = (slice(16 * k, 16 * (k + 1)) for k in range(4))
    assert bool((draws.t[generators] == 1).all() and (draws.r[generators] == 0).all())
    assert bool((draws.t[16:] < 1).all() and (draws.t[16:] >= 0).all())
    assert bool((draws.r[local] <= draws.t[local]).all())
    assert bool((draws.r[local] >= 0.95 * draws.t[local] - 1e-6).all())
    assert bool((draws.r[jump] <= draws.t[jump]).all() and (draws.r[jump] >= 0).all())
    assert float((draws.t - draws.r)[jump].max()) > 0.2
    assert bool((draws.r[fake] == draws.t[fake]).all())
    assert draws.z_fake.shape == draws.z_again.shape == (16, *LATENT)
    again = Published().draw(64, seed=3, step=5, latent=LATENT)
    assert bool((again.z == draws.z).all())
    assert not bool((Published().draw(64, seed=3, step=6, latent=LATENT).z == draws.z).any())


def test_it_makes_eight_calls_and_many_passes_that_nobody_needs() -> None:
    log: list[tuple[str, int, bool]] = []
    student, teacher = Counting("student", nothing, log), Counting("teacher", nothing, log)
    draws = Published().draw(64, seed=0, step=0, latent=LATENT)
    batch: Batch = replace(toy_batch(64), data=normal("data", 64, *LATENT).float())
    Published().loss(student, teacher, batch, draws)
    assert len(log) == 8
    assert sum(rows for _, rows, with_gradient in log if not with_gradient) == 4.75 * 64
    assert [rows for _, rows, with_gradient in log if with_gradient] == [64]


def test_it_writes_to_none_of_its_arguments() -> None:
    batch, draws = toy_batch(8), plain_draws(whole(TwinFlow(), 8))
    before = [value.clone() for value in (batch.data, *vars(draws).values())]
    Published().loss(network(0), network(1), batch, draws)
    for value, old in zip((batch.data, *vars(draws).values()), before, strict=True):
        assert torch.equal(value, old)
