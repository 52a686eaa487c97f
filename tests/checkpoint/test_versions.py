"""Checkpoints of every version that was ever written are read for ever.

`tests/checkpoints/vN` was written by the program when N was its format. TWINFLOW_RECORD=1 writes
the present version's, if it is not there yet: what is there is never written again.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.tools import Trial
from tests.helpers import spawn
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.checkpoint.index import VERSION
from twinflow_train.checkpoint.inspecting import find, look
from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded
from twinflow_train.models.qwen_image import QwenImage

KEPT = Path(__file__).parent.parent / "checkpoints"
VERSIONS = range(1, VERSION + 1)
STEP, RANKS = 3, 2
SIZE = QwenImage(layers=1, heads=1, head_dim=6, text_width=3, channels=1, rope=[2, 2, 2])
IDENTITY: dict[str, Any] = {
    "model": {
        "_type": "QwenImage",
        "layers": 1,
        "heads": 1,
        "head_dim": 6,
        "text_width": 3,
        "channels": 1,
        "patch": 2,
        "rope": [2, 2, 2],
    },
    "objective": {
        "_type": "TwinFlow",
        "guidance": 0.5,
        "shares": {"_type": "Shares", "fake": 1.0},
    },
    "seed": 0,
    "batch": 8,
    "init_from": None,
    "data": {"window": 16, "contents": "0" * 64},
}


def values(key: str, offset: int, length: int) -> Tensor:
    """Give the numbers that a tensor of this name has there: exact in float32."""
    places = torch.arange(offset, offset + length) * 37 + zlib.crc32(key.encode()) % 997
    return (places % 2048 - 1024) / 256


def opened(world: World, folder: Path) -> tuple[Sharded, Checkpoints]:
    engine = Trial.of(4).shard(world, size=SIZE)
    saves = Checkpoints(
        folder=folder, engine=engine, progress=Progress(), world=world, identity=IDENTITY
    )
    return engine, saves


def record(world: World, folder: Path) -> None:
    engine, saves = opened(world, folder)
    for span in engine.spans():
        key = f"{span.kind}/{span.name}"
        span.local.copy_(values(key, span.offset, span.local.numel()))
    engine.restored(STEP)
    saves.progress.step, saves.progress.samples = STEP, 8 * STEP
    saves.write()
    saves.finish()


def read(world: World, folder: Path) -> tuple[int, int, int, list[str]]:
    engine, saves = opened(world, folder)
    assert saves.resume(must=True)
    wrong = [
        span.name
        for span in engine.spans()
        if not span.local.equal(values(f"{span.kind}/{span.name}", span.offset, span.local.numel()))
    ]
    return saves.progress.step, saves.progress.samples, engine.updates, wrong


def test_the_present_version_is_kept() -> None:
    folder = KEPT / f"v{VERSION}"
    if os.environ.get("TWINFLOW_RECORD") == "1" and not folder.exists():
        spawn(record, RANKS, folder)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 200_000


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_read_in_every_number(version: int) -> None:
    told: list[tuple[int, int, int, list[str]]] = spawn(read, 1, KEPT / f"v{version}")
    assert told[0] == (STEP, 8 * STEP, STEP, [])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_described(version: int) -> None:
    (place,) = find(str(KEPT / f"v{version}"))
    found = look(place, bytewise=True)
    assert found.fault == ""
    assert f"format {version}" in found.text
    assert "QwenImage" in found.text
    assert "4,837 parameters" in found.text
