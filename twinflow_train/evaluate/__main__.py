"""Evaluate: `python -m twinflow_train.evaluate from=RUN suite=digits` draws, scores and compares.

Under torchrun the prompts are dealt to the ranks. What is drawn already is kept, so a command that
was killed goes on, and one that is given again only scores.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import Any

from hydra.core.config_store import ConfigStore

from twinflow_train import dist, run
from twinflow_train.evaluate.benchmarks import DPG, GenEval
from twinflow_train.evaluate.job import evaluate
from twinflow_train.evaluate.settings import Evaluating
from twinflow_train.evaluate.suites import Judged, Prompts
from twinflow_train.launch import launch
from twinflow_train.models import families
from twinflow_train.models.features import CLIP, DINOv2, Inception

GROUPS: Mapping[str, Mapping[str, Any]] = {
    "suite": {
        "digits": Judged(),
        "emoji": Judged(
            heldout="datasets/emoji-few/heldout", judge="datasets/emoji-few/judge.safetensors"
        ),
        "prompts": Prompts(),
        "geneval": GenEval(),
        "dpg": DPG(),
    },
    "features": {"inception": Inception(), "dinov2": DINOv2(), "clip": CLIP()},
    "model": run.GROUPS["model"],
    "encoders": families.OPTIONS,
}
"""Every option of every group; its defaults are the instance's values."""


def register() -> None:
    """Tell Hydra the groups."""
    store = ConfigStore.instance()
    store.store(name="evaluating", node=Evaluating)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)


def start(settings: Evaluating) -> int:
    """Evaluate, and say what came out."""
    with dist.start() as world:
        # Nothing has to be saved first: what is drawn is on disk.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        lines = evaluate(settings, world)
        if world.main:
            print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    # `from` is a word of Python, which no field may be called.
    sys.argv[1:] = [
        "from_" + word[4:] if word.startswith("from=") else word for word in sys.argv[1:]
    ]
    launch(start, config="evaluate", register=register)
