"""Compiled blocks compute what the others do, from few graphs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from tests.helpers import spawn
from tests.tiny import build, words
from twinflow_train.checkpoint import Progress
from twinflow_train.data.feed import Feed
from twinflow_train.dist import World
from twinflow_train.engines.compiling import MOST_GRAPHS
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.errors import UserError
from twinflow_train.faults import safeguards
from twinflow_train.late import Lap
from twinflow_train.launch import compose
from twinflow_train.loop import learn, prepare
from twinflow_train.run import register

STEPS = 4
graphs: list[Any] = []


def counted(graph: Any, inputs: Any) -> Any:
    """Run what was captured as it is, and count: generating code takes most of the time."""
    graphs.append(graph)
    return graph.forward


def losses(world: World, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Take steps of the tiny run without a compiler and with it; return losses and norms."""
    torch._dynamo.register_backend(counted, name="counted")
    register()
    found: dict[str, list[tuple[float, float]]] = {}
    for compiler in ("null", "counted"):
        more = ("engine=fsdp2", "engine.precision=fp32", "engine.recompute=1")
        overrides = words(folder, folder / "run", *more, f"engine.compile={compiler}")
        with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
            run = compose(hydra.compose("train", overrides=overrides))
        engine, progress = run.shard(world), Progress()
        with (
            safeguards(run.faults, progress.faults, folder, world) as safe,
            Feed(steps=partial(prepare, run, world), world=world, budget=0) as feed,
        ):
            for _ in range(STEPS):
                lap, prepared = Lap(world.device), feed.take(progress.position)
                launched = learn(run, engine, feed, prepared, lap, progress, safe, world)
                told = launched.told.read()
                loss = told[launched.names.index("loss/total")]
                found.setdefault(compiler, []).append((loss, told[-2]))
                progress.advance(run.batch)
        assert bool(graphs) == (compiler == "counted")
    assert len(graphs) <= MOST_GRAPHS
    return found


def test_compiled_blocks_train_the_same_from_few_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.setenv("TWINFLOW_TYPE_HOOK", "0")  # which no compiler can look through
    (found,) = spawn(losses, 1, tmp_path, timeout_seconds=300)
    for ours, theirs in zip(found["counted"], found["null"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.compile is inducter; it must be null or one of"):
        FSDP2(compile="inducter")
