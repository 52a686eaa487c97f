import pytest
import torch

from tests.flow.tools import normal
from tests.golden.record import CASES, arrays, tensor
from twinflow_train.errors import UserError
from twinflow_train.flow.losses import Distance, l2

ONE_STEP = [c for c in CASES["train"] if c["config"]["steps"] == 1 and c["config"]["order"]]


@pytest.mark.parametrize("case", ONE_STEP, ids=[case["name"] for case in ONE_STEP])
def test_equals_the_recorded_distances(case: dict) -> None:
    setting, out = case["config"]["distance"], f"{case['name']}/step0/out/"
    plain = setting["type"] == "l2"
    distance = l2() if plain else Distance(alpha=setting["alpha"])
    fake = torch.from_numpy(arrays()[out + "role"] == "fake").reshape(-1, 1, 1, 1)
    target = torch.where(fake, tensor(out + "velocity"), tensor(out + "recursion_target"))
    # The published l2 takes its differences in float32.
    rtol = 2e-7 if plain or case["config"]["dtype"] == "float32" else 1e-14
    found = distance(tensor(out + "prediction"), target)
    torch.testing.assert_close(found, tensor(out + "distance_base"), rtol=rtol, atol=0)


def test_l2_is_the_mean_square_of_each_sample() -> None:
    pred, target = normal("pred", 3, 2, 4, 4), normal("target", 3, 2, 4, 4)
    expected = torch.stack([((p - q) ** 2).mean() for p, q in zip(pred, target, strict=True)])
    torch.testing.assert_close(l2()(pred, target), expected)


def test_barron_is_about_the_root_mean_square_at_alpha_1_and_the_mean_square_at_2() -> None:
    pred, target = normal("pred", 3, 2, 4, 4), normal("target", 3, 2, 4, 4)
    m = l2()(pred, target)
    torch.testing.assert_close(Distance()(pred, target), m.sqrt(), rtol=0.01, atol=0)
    torch.testing.assert_close(Distance(alpha=2.0, c=0.5)(pred, target), 2 * m)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.5, 1.0, 2.0])
def test_the_reweighting_passes_no_gradient(alpha: float) -> None:
    pred, target = normal("pred", 2, 6), normal("target", 2, 6)
    pred.requires_grad_()
    d, m = Distance(alpha=alpha)(pred, target), l2()(pred, target)
    (found,) = torch.autograd.grad(d.sum(), pred)
    (plain,) = torch.autograd.grad(m.sum(), pred)
    torch.testing.assert_close(found, (d / m).detach()[:, None] * plain)


@pytest.mark.parametrize("distance", [l2(), Distance(), Distance(alpha=2.0)])
def test_equal_tensors_are_at_distance_0_with_gradient_0(distance: Distance) -> None:
    pred = normal("pred", 2, 6).requires_grad_()
    d = distance(pred, pred.detach().clone())
    (gradient,) = torch.autograd.grad(d.sum(), pred)
    assert d.tolist() == [0.0, 0.0]
    assert not gradient.any()


@pytest.mark.parametrize("distance", [l2(), Distance()])
def test_low_precision_is_computed_in_float32(distance: Distance) -> None:
    pred, target = normal("pred", 2, 64).bfloat16(), normal("target", 2, 64).bfloat16()
    assert distance(pred, target).dtype == torch.float32
    assert distance(pred, target).equal(distance(pred.float(), target.float()))
    assert distance(pred.double(), target.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("key", "value"),
    [("c", 0.0), ("c", -1.0), ("c", float("nan")), ("alpha", float("inf"))],
)
def test_refuses_what_has_no_value(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"distance\.{key} is {value}"):
        Distance(**{key: value})
