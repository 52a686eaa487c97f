"""One run on every layout: engines, ranks and copies change nothing but the order of sums.

Six steps of TwinFlow on a tiny Qwen-Image with all that a large run has: accumulation over
micro-batches, recomputed blocks, clipping and an averaged teacher.
"""

from __future__ import annotations

import pytest

from tests.engines.test_zero3 import zero3
from tests.engines.tools import (
    BATCH,
    OPTIM,
    STEPS,
    Outcome,
    Trial,
    apart,
    fsdp2,
    run,
    run_plainly,
)
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.engines.base import Engine, Precision

Key = tuple[str, Precision]

MICRO_BATCH = 1
RANKS = {"fsdp2 x1": 1, "fsdp2 x2": 2, "zero3 x2": 2, "fsdp2 x4": 4, "hsdp 2x2": 4}

NEAR = {
    Precision.fp32: {"loss": 1e-6, "norm": 1e-6, "model": 1e-6, "average": 1e-6},
    # A master weight's last bit may decide how the weight that is computed with is rounded.
    Precision.bf16: {"loss": 1e-4, "norm": 1e-3, "model": 1e-4, "average": 1e-4},
}
"""How far layouts may be apart: losses and norms relative, weights absolute (they are near 1)."""

ROUNDED = {"loss": 0.01, "norm": 0.1, "model": 4 * OPTIM.lr, "average": 4 * OPTIM.lr}
"""How far a run in bfloat16 may be from float32, measured alike."""


def engine(layout: str, precision: Precision) -> Engine:
    if layout.startswith("zero3"):
        return zero3(precision=precision, recompute=1)
    return fsdp2(precision=precision, recompute=1, shard_over=2 if layout == "hsdp 2x2" else 0)


def outcomes(world: World) -> dict[Key, Outcome]:
    """Run every layout of this number of ranks."""
    return {
        (layout, precision): run(Trial.of(MICRO_BATCH, engine=engine(layout, precision)), world)
        for layout, ranks in RANKS.items()
        if ranks == world.size
        for precision in Precision
    }


@pytest.fixture(scope="module")
def found() -> dict[Key, Outcome]:
    with pytest.MonkeyPatch.context() as env:
        env.setenv("TWINFLOW_TYPE_HOOK", "0")  # shapes are checked where each engine is tested
        results: dict[Key, Outcome] = {}
        for ranks in sorted(set(RANKS.values())):
            results |= spawn(outcomes, ranks, timeout_seconds=500)[0]
    return results


@pytest.fixture(scope="module")
def plain() -> Outcome:
    """The run without an engine: one process, whole tensors, float32."""
    return run_plainly(Trial.of(BATCH))


def beyond(allowed: dict[str, float], far: dict[str, float]) -> dict[str, float]:
    """Return what is further apart than it may be."""
    return {key: distance for key, distance in far.items() if distance > allowed[key]}


def test_the_run_accumulates_and_clips_and_its_teacher_lags(plain: Outcome) -> None:
    assert max(RANKS.values()) * MICRO_BATCH < BATCH
    assert len(plain.losses) == STEPS == 6
    assert min(plain.norms) > OPTIM.clip
    assert apart(plain.model, plain.average) > 1e-4


@pytest.mark.parametrize("layout", list(RANKS))
def test_in_float32_every_layout_is_one_plain_process(
    found: dict[Key, Outcome], plain: Outcome, layout: str
) -> None:
    ours = found[layout, Precision.fp32]
    assert beyond(NEAR[Precision.fp32], ours.worst(plain)) == {}


@pytest.mark.parametrize("layout", list(RANKS))
def test_in_bfloat16_layouts_agree_with_one_another(found: dict[Key, Outcome], layout: str) -> None:
    ours, one = found[layout, Precision.bf16], found["fsdp2 x1", Precision.bf16]
    assert beyond(NEAR[Precision.bf16], ours.worst(one)) == {}


@pytest.mark.parametrize("layout", list(RANKS))
def test_in_bfloat16_every_layout_is_near_float32(
    found: dict[Key, Outcome], plain: Outcome, layout: str
) -> None:
    far = found[layout, Precision.bf16].worst(plain)
    assert beyond(ROUNDED, far) == {}
    # It is not float32 under another name.
    assert far["loss"] > 1e-5
