"""One step of our objective against recorded steps of the published one: loss and gradient.

The published code rounds two differences to float32 on their way: delta_v before its clamp, and the
one that l2 squares. `Rounded` and `RoundedL2` do so here; what is left is float64's rounding.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden.record import CASES, tensor, tensors
from tests.golden.toynet import ConvNet, LoraNet
from tests.objectives.tools import Net, batch_of, conv, draws_of, objective_of
from twinflow_train.batch import Condition
from twinflow_train.flow.losses import Distance
from twinflow_train.objectives.twinflow import Loss

TRAIN = {case["name"]: case["config"] for case in CASES["train"]}
ONE_STEP = [name for name in TRAIN if name != "multi5_default"]
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


class Rounded(nn.Module):
    """A network of which the fake velocity differs from the real one by a float32 number."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.inner = net
        self.net = net.net

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        F: Tensor = self.inner(x_t, t, r, cond)
        pairs = int((t < 0).sum())
        if not pairs or torch.is_grad_enabled():
            return F
        *others, real, fake = F.split([len(F) - 2 * pairs, pairs, pairs])
        return torch.cat([*others, real, real + (fake - real).float().to(F)])


class RoundedL2(Distance):
    """The mean square of a difference of float32 numbers, taken in float32."""

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target.float()).square().flatten(1).mean(1).to(pred)


def networks(name: str, config: dict[str, Any]) -> tuple[Net, Net]:
    """Return student and teacher of a recorded case's first step."""
    dtype = getattr(torch, config["dtype"])
    weights = tensors(f"{name}/student/")
    if config["variant"] == "lora":
        net = LoraNet(dtype=dtype)
        net.load_state_dict(weights)
        frozen = config["ema_decay"] == 1
        teacher = copy.deepcopy(net)
        if not frozen:
            teacher.lora["old"].load_state_dict(net.lora["default"].state_dict())
        student = Net(net, shift=True)
        return student, Net(teacher, shift=True, adapter=None if frozen else "old")
    student = conv(weights, dtype)
    if config["ema_decay"] == 0:
        return student, student
    if config["ema_decay"] == 1:
        return student, conv(tensors(f"{name}/teacher_initial/"), dtype)
    return student, copy.deepcopy(student)  # the decay is still 0 at the first step


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    difference = (ours.detach().double() - theirs.double()).abs().max()
    assert float(difference) <= tolerance * max(float(theirs.abs().max()), 1e-6)


def gradient(net: nn.Module, total: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(named.items(), grads, strict=True)
    }


@pytest.mark.parametrize("name", ONE_STEP)
def test_recorded_step(name: str) -> None:
    config = TRAIN[name]
    tolerance = TOLERANCE[config["dtype"]]
    l2 = {"distance": RoundedL2()} if config["distance"]["type"] == "l2" else {}
    objective = objective_of(config, **l2)
    inner = networks(name, config)
    rounded = {net: Rounded(net) for net in inner}  # a teacher that is the student stays it
    student, teacher = (rounded[net] for net in inner)
    batch = batch_of(name)
    draws = draws_of(name, 0, objective, config["batch"])
    close(draws.t, tensor(f"{name}/step0/out/t").flatten().abs(), 1e-12)
    close(draws.r, tensor(f"{name}/step0/out/r").flatten().abs(), tolerance)
    loss: Loss = objective.loss(student, teacher, batch, draws)
    close(loss.total, tensor(f"{name}/step0/out/loss"), tolerance)
    recorded = tensors(f"{name}/step0/grad/")
    for key, ours in gradient(student.net, loss.total).items():
        if key in recorded:
            close(ours, recorded[key], tolerance)


def test_five_recorded_steps_with_a_growing_average() -> None:
    from twinflow_train.engines.average import decay_at, follow

    name, config = "multi5_default", TRAIN["multi5_default"]
    objective, batch = objective_of(config), batch_of(name)
    student = Rounded(conv(tensors(f"{name}/student/")))
    teacher = copy.deepcopy(student)
    for step in range(config["steps"]):
        draws = draws_of(name, step, objective, config["batch"])
        total = objective.loss(student, teacher, batch, draws).total
        close(total, tensor(f"{name}/step{step}/out/loss"), 1e-12)
        grads = gradient(student.net, total)
        with torch.no_grad():
            for key, parameter in student.net.named_parameters():
                parameter.sub_(config["sgd_lr"] * grads[key])
        for key, value in tensors(f"{name}/step{step}/student_after/").items():
            close(student.net.state_dict()[key], value, 1e-12)
        follow(
            list(teacher.parameters()),
            [p.detach() for p in student.parameters()],
            decay_at(config["ema_decay"], step + 1),
            path=(step,),
        )


def test_cases_are_all_here() -> None:
    assert len(TRAIN) == 20
    assert isinstance(conv(tensors("default/student/")).net, ConvNet)
