"""Products in 8 bits: near the others, and no state that they do not have."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tests.engines.tools import SIZE, Trial, fsdp2
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.engines.fp8 import MULTIPLE, to_fp8
from twinflow_train.errors import UserError

WIDE = replace(SIZE, heads=2, head_dim=16, rope=[4, 6, 6])
STEPS = 3


def curves(world: World, beside: str) -> dict[bool, tuple[list[float], list[str]]]:
    """Train with and without; return losses and the names of parameters."""
    WIDE.build()  # imports diffusers, which would look for torchao
    sys.path.append(beside)
    found = {}
    for fp8 in (False, True):
        trial = Trial.of(4, engine=fsdp2(fp8=fp8))
        engine = trial.shard(world, size=WIDE)
        losses = [trial.learn(engine, step, world)[0] for step in range(STEPS)]
        found[fp8] = losses, [*engine.shapes()]
    return found


def test_products_in_8_bits_train_nearly_the_same(beside: str) -> None:
    assert WIDE.heads * WIDE.head_dim % MULTIPLE == 0
    (found,) = spawn(curves, 1, beside)
    (ours, names), (theirs, usual) = found[True], found[False]
    assert names == usual
    assert ours == pytest.approx(theirs, rel=0.1)
    assert ours != pytest.approx(theirs, rel=1e-4)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"engine\.fp8 needs torchao: pip install"):
        to_fp8([], emulate=True)
