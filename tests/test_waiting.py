"""A normal step asks the device for nothing: the host is free to prepare what comes next."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import spawn
from tests.tiny import build, words
from twinflow_train.checkpoint import Progress
from twinflow_train.data.feed import Feed
from twinflow_train.dist import World
from twinflow_train.faults import safeguards
from twinflow_train.late import Lap
from twinflow_train.launch import compose
from twinflow_train.loop import learn, prepare
from twinflow_train.run import register

WAITS = (
    *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "allclose"),
    *("masked_select", "unique", "_unique2", "repeat_interleave", "bincount"),
)
"""Operators whose result, or its shape, the host has to read from the device."""


class Waits(TorchDispatchMode):
    """Counts the operators for which a host would wait for its GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        picks = name in ("index", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or picks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waited(world: World, folder: Path, more: tuple[str, ...]) -> list[Counter[str]]:
    """Take three steps of the tiny run; return what the host waited for in each."""
    register()
    with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        run = compose(hydra.compose("train", overrides=words(folder, folder / "run", *more)))
    engine, progress = run.shard(world), Progress()
    found: list[Counter[str]] = []
    padded: list[bool] = []
    with (
        safeguards(run.faults, progress.faults, folder, world) as safe,
        Feed(steps=lambda step: prepare(run, world, step), world=world, budget=0) as feed,
    ):
        for _ in range(3):
            lap, prepared = Lap(world.device), feed.take(progress.position)
            padded.append(any(batch.cond.mask is not None for batch in prepared.batches))
            with Waits() as counted:
                launched = learn(run, engine, feed, prepared, lap, progress, safe, world)
            assert launched.told.read()[-1] == 1.0  # updated
            found.append(counted.found)
            progress.advance(run.batch)
    assert any(padded), "texts of several lengths are the usual case"
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waiting")
    build(folder)
    return folder


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ("engine=fsdp2", "engine.recompute=1")),
        (2, ("engine=fsdp2_gathered", "average.slow=0.9", "engine.precision=bf16")),
        (1, ("engine=single", "objective.teacher_decay=0", "micro_batch=8")),
    ],
    ids=["recomputed", "gathered", "single"],
)
def test_a_step_waits_for_nothing(made: Path, ranks: int, more: tuple[str, ...]) -> None:
    for rank in spawn(waited, ranks, made, more):
        assert rank == [Counter()] * 3


def test_what_waits_is_found() -> None:
    with Waits() as counted:
        numbers = torch.ones(3)
        float(numbers.sum())
        numbers[numbers > 0]
        numbers.nonzero()
    assert counted.found.keys() == {"_local_scalar_dense", "index", "nonzero"}
