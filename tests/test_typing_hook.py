"""The annotations of the lower layers are checked while tests run: wrong shapes do not pass."""

from __future__ import annotations

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

from tests import typing_hook
from twinflow_train import rng
from twinflow_train.batch import Batch, Condition

pytestmark = pytest.mark.skipif(not typing_hook.ACTIVE, reason="the type hook is switched off")


def test_a_wrong_rank_is_caught() -> None:
    Condition(tokens=torch.zeros(2, 3, 4))
    with pytest.raises(TypeCheckError):
        Condition(tokens=torch.zeros(2, 3))


def test_axes_of_one_name_must_agree() -> None:
    with pytest.raises(TypeCheckError):
        Condition(tokens=torch.zeros(2, 3, 4), mask=torch.ones(2, 5, dtype=torch.bool))


def test_a_wrong_dtype_is_caught() -> None:
    with pytest.raises(TypeCheckError):
        Condition(tokens=torch.zeros(2, 3, 4), mask=torch.ones(2, 3))


def test_an_argument_of_a_wrong_type_is_caught() -> None:
    with pytest.raises((TypeCheckError, BeartypeCallHintParamViolation)):
        Condition(tokens=torch.zeros(1, 3, 4)).expand("2")  # type: ignore[arg-type]


def test_a_return_value_of_a_wrong_shape_is_caught() -> None:
    condition = Condition(tokens=torch.zeros(2, 3, 4))
    condition.mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(TypeCheckError):
        condition.full_mask()


def test_what_is_right_passes() -> None:
    rows = [torch.zeros(2, 4), torch.zeros(3, 4)]
    batch = Batch(
        data=torch.zeros(2, 1, 8, 8),
        cond=Condition.pad(rows),
        null=Condition.pad(rows[:1]),
        keys=("a", "b"),
    )
    assert len(batch.cond[:1].padded(5)) == 1
    assert batch.to("cpu").cond.tokens.shape == (2, 3, 4)
    assert Condition.cat([batch.cond, batch.null.expand(2)]).full_mask().shape == (4, 3)
    assert rng.generator("noise", 0, 1).initial_seed() == rng.digest("noise", 0, 1)
