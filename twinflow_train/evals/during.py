"""Evaluation inside a run: the network in training against the base it started from."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twinflow_train.batch import Velocity
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.evals import grid
from twinflow_train.evals.agreed import EvaluationError, agreed
from twinflow_train.evals.health import Health
from twinflow_train.evals.heldout import heldout_loss
from twinflow_train.evals.results import Evaluation
from twinflow_train.evals.suite import Evals

log = logging.getLogger(__name__)
HELDOUT_SAMPLES, HELDOUT_BATCH = 480, 120


@dataclass(kw_only=True)
class Found:
    """What one evaluation inside a run found, the picture it drew, and how many seconds it took.

    failed: nothing was found, and a warning said why.
    """

    evaluation: Evaluation
    heldout: dict[str, float]
    health: dict[str, float]
    picture: Path
    seconds: float = 0.0
    failed: bool = False

    @property
    def caption(self) -> str:
        """Say what the picture shows: its columns, and the prompts of its rows."""
        columns = " | ".join(each.heading.replace("\n", " ") for each in self.evaluation.columns())
        return "\n".join([columns, *self.evaluation.captions])

    def metrics(self) -> dict[str, float]:
        """Return what a log takes, of the network in training."""
        ours = {
            k: v for k, v in self.evaluation.metrics().items() if not k.startswith("eval/base/")
        }
        told = {"eval/failed": float(self.failed), "time/eval": self.seconds}
        losses = {f"eval/{name}": loss for name, loss in self.heldout.items()}
        return ours | self.evaluation.gaps() | losses | self.health | told


def evaluate(
    suite: Evals,
    networks: Mapping[str, Velocity],
    *,
    base: Velocity,
    health: Health,
    heldout: ShardSet,
    folder: Path,
    step: int,
    world: World,
) -> Found:
    """Evaluate the networks, held-out losses and health; at step 0 also the base that they are.

    The base's results and pictures stay in `folder`/base and stand beside every later step's;
    pictures go to `folder`. An evaluation that fails finds nothing, on all ranks alike, and
    training goes on. Collective.
    """
    began = time.perf_counter()
    # With others only what they know of too can be survived: they would wait for this rank.
    survived = EvaluationError if world.size > 1 else Exception
    found = Found(
        evaluation=Evaluation(), heldout={}, health={}, picture=folder / f"step-{step:08d}.png"
    )
    try:
        before = _base(suite, base, heldout=heldout, folder=folder, step=step, world=world)
        found.evaluation = before + suite.evaluate(networks, suite.samplers, heldout, world)
        for model, velocity in networks.items():
            losses = heldout_loss(
                velocity, heldout, world, samples=HELDOUT_SAMPLES, batch=HELDOUT_BATCH, seed=0
            )
            found.heldout |= {f"{model}/{name}": loss for name, loss in losses.items()}
        found.health = health.measure(heldout, world)
        if world.main and found.evaluation.pictures:
            _draw(found.evaluation, found.picture)
    except survived as error:
        found.failed = True
        log.warning("the evaluation at step %d failed (%r); training goes on", step, error)
    found.seconds = time.perf_counter() - began
    return found


def _draw(found: Evaluation, path: Path) -> None:
    """Write the picture of pictures."""
    with _spare(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(grid.draw(found.columns(), prompts=found.captions), path)


@contextmanager
def _spare(path: Path) -> Iterator[None]:
    """Write something that a run can do without, if the disk is full."""
    try:
        yield
    except OSError as error:
        log.warning("%s was not written, training goes on: %s", path, error.strerror)


def _base(
    suite: Evals, velocity: Velocity, *, heldout: ShardSet, folder: Path, step: int, world: World
) -> Evaluation:
    """Evaluate the base at step 0, and remember it after."""
    if not suite.base:
        return Evaluation()
    kept = folder / "base"
    if step == 0:
        base = suite.evaluate({"base": velocity}, suite.base, heldout, world)
        if world.main:
            with _spare(kept):
                base.save(kept)
        return base
    if world.any(not kept.is_dir()):
        log.warning("%s is missing: the base is left out of tables and pictures", kept)
        return Evaluation()
    return agreed(world, lambda: Evaluation.load(kept))
