"""Evaluation inside a run: the network in training against the base it started from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twinflow_train.batch import Velocity
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.evals import grid
from twinflow_train.evals.health import Health
from twinflow_train.evals.heldout import heldout_loss
from twinflow_train.evals.results import Evaluation
from twinflow_train.evals.suite import Evals

log = logging.getLogger(__name__)
HELDOUT_SAMPLES, HELDOUT_BATCH = 480, 120


@dataclass(kw_only=True)
class Found:
    """What one evaluation inside a run found, and the picture it drew."""

    evaluation: Evaluation
    heldout: dict[str, float]
    health: dict[str, float]
    picture: Path

    def metrics(self) -> dict[str, float]:
        """Return what a log takes, of the network in training."""
        ours = {
            k: v for k, v in self.evaluation.metrics().items() if not k.startswith("eval/base/")
        }
        return ours | {f"eval/{name}": loss for name, loss in self.heldout.items()} | self.health


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
    pictures go to `folder`. Collective.
    """
    before = _base(suite, base, heldout=heldout, folder=folder, step=step, world=world)
    both = before + suite.evaluate(networks, suite.samplers, heldout, world)
    losses: dict[str, float] = {}
    for model, velocity in networks.items():
        found = heldout_loss(
            velocity, heldout, world, samples=HELDOUT_SAMPLES, batch=HELDOUT_BATCH, seed=0
        )
        losses |= {f"{model}/{name}": loss for name, loss in found.items()}
    picture = folder / f"step-{step:08d}.png"
    if world.main and both.pictures:
        with _spare(picture):
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(grid.draw(both.columns(), prompts=both.captions), picture)
    return Found(
        evaluation=both, heldout=losses, health=health.measure(heldout, world), picture=picture
    )


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
    return Evaluation.load(kept)
