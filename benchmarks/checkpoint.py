"""How long does a save stop the training, against writing it all before going on?

`python -m benchmarks.checkpoint --parameters 50` saves weights, one average and two moments of so
many million parameters; under torchrun each rank saves its share, as in a run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from twinflow_train import dist
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.base import Span

KINDS = ("model", "average", "exp_avg", "exp_avg_sq")
TENSOR = 9_437_184
"""Numbers of a matrix of 3072 by 3072, of which Qwen-Image has most."""


class Numbers:
    """This rank's share of a state of so many parameters, in tensors of a usual size."""

    def __init__(self, parameters: int, world: World) -> None:
        self.updates = 0
        self._spans = []
        whole, rest = divmod(parameters, TENSOR)
        for kind in KINDS:
            for number, size in enumerate([TENSOR] * whole + [rest] * bool(rest)):
                chunk = -(-size // world.size)
                offset = min(chunk * world.rank, size)
                local = torch.full((min(chunk, size - offset),), 0.5, device=world.device)
                self._spans.append(
                    Span(kind=kind, name=str(number), shape=(size,), offset=offset, local=local)
                )

    def spans(self) -> Iterator[Span]:
        yield from self._spans

    def restored(self, updates: int) -> None:
        self.updates = updates


def measure(parameters: int, folder: Path, *, saves: int, world: World) -> str:
    """Save some times and return a table of seconds; collective."""
    progress = Progress()
    checkpoints = Checkpoints(
        folder=folder,
        engine=Numbers(parameters, world),
        progress=progress,
        world=world,
        identity={},
        keep=1,
    )
    stalls, wholes = [], []
    for _ in range(saves + 1):
        progress.advance(1)
        world.barrier()
        began = time.perf_counter()
        checkpoints.write()
        stalls.append(time.perf_counter() - began)
        checkpoints.finish()
        wholes.append(time.perf_counter() - began)
    size = len(KINDS) * 4 * parameters / 1e9
    stall, synchronous = statistics.median(stalls[1:]), statistics.median(wholes[1:])
    return (
        f"{parameters / 1e6:,.0f}M parameters: {size:,.2f} GB, {world.size} x {world.device.type}, "
        f"median of {saves}\n\n"
        "| | seconds |\n|---|---:|\n"
        f"| the training stands still | {stall:.2f} |\n"
        f"| the same, the first time, which takes the memory | {stalls[0]:.2f} |\n"
        f"| if it waited for the disk | {synchronous:.2f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=50, help="millions")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; else a temporary folder")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, dist.start() as world:
        folder = world.gather_texts(str(words.folder or temporary))[0]
        table = measure(round(words.parameters * 1e6), Path(folder), saves=words.saves, world=world)
        if world.main:
            print(table)
