"""What tests of checkpoints share: states to save, ways to compare them, and who listens."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engines.tools import State
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded, Span

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
IDENTITY: dict[str, Any] = {
    "seed": 0,
    "model": {"layers": 2},
    "objective": {"guidance": 0.5, "shares": {"fake": 1.0}},
}
RANK_FILE = "rank-00000.safetensors"


@dataclass(kw_only=True)
class Held:
    """What one rank holds of a tensor."""

    shape: tuple[int, ...]
    offset: int
    values: Tensor


@dataclass(kw_only=True)
class Part:
    """One rank's part of the whole state, and what is counted beside it."""

    pieces: dict[str, Held]
    updates: int
    progress: tuple[int, int]


def state_of(engine: Sharded, progress: Progress) -> Part:
    """Copy what a rank holds."""
    pieces = {
        f"{span.kind}/{span.name}": Held(
            shape=span.shape, offset=span.offset, values=span.local.detach().clone()
        )
        for span in engine.spans()
    }
    counted = (progress.step, progress.samples)
    return Part(pieces=pieces, updates=engine.updates, progress=counted)


def assembled(parts: list[Part]) -> State:
    """Put the ranks' pieces together."""
    tensors: State = {}
    for key, first in parts[0].pieces.items():
        flat = torch.full((math.prod(first.shape),), torch.nan)
        for part in parts:
            piece = part.pieces[key]
            flat[piece.offset : piece.offset + len(piece.values)] = piece.values
        tensors[key] = flat.view(first.shape)
    return tensors


class Plain:
    """A state of plain tensors, each cut into equal chunks over the ranks; no network at all."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], world: World) -> None:
        self.updates = 0
        self._spans = []
        for key, shape in shapes.items():
            kind, _, name = key.partition("/")
            chunk = -(-math.prod(shape) // world.size)
            offset = min(chunk * world.rank, math.prod(shape))
            local = torch.zeros(min(chunk, math.prod(shape) - offset))
            self._spans.append(Span(kind=kind, name=name, shape=shape, offset=offset, local=local))

    def spans(self) -> Iterator[Span]:
        yield from self._spans

    def restored(self, updates: int) -> None:
        self.updates = updates

    def fill(self, value: float) -> None:
        """Let every number be `value`."""
        for span in self._spans:
            span.local.fill_(value)

    def values(self) -> set[float]:
        """Return the numbers that occur in this rank's part."""
        return {float(x) for span in self._spans for x in span.local.unique()}


SHAPES = {"model/a": (3, 5), "model/b": (7,), "average/a": (3, 5), "exp_avg/a": (3, 5)}


@dataclass(kw_only=True)
class Plainly:
    """A run without training: a plain state, its progress and its checkpoints."""

    state: Plain
    progress: Progress
    saves: Checkpoints

    @staticmethod
    def open(
        folder: Path | str,
        world: World = ALONE,
        *,
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
        **settings: Any,
    ) -> Plainly:
        """Open the checkpoints in a folder."""
        state, progress = Plain(shapes, world), Progress()
        saves = Checkpoints(
            **({"identity": IDENTITY} | settings),
            folder=folder,
            engine=state,
            progress=progress,
            world=world,
        )
        return Plainly(state=state, progress=progress, saves=saves)

    def go(self, step: int) -> None:
        """Be at a step, with every number the step."""
        self.state.fill(step)
        self.state.updates = step
        self.progress.step, self.progress.samples = step, 8 * step

    def save(self, *steps: int) -> None:
        """Save these steps, one after the other, to their ends."""
        for step in steps:
            self.go(step)
            self.saves.write()
            self.saves.finish()


class Listener(logging.Handler):
    """Remembers the warnings about checkpoints while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())

    def __enter__(self) -> Listener:
        logging.getLogger("twinflow_train.checkpoint").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("twinflow_train.checkpoint").removeHandler(self)


def index_of(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's index."""
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def steps_in(folder: Path) -> list[int]:
    """List the steps that have a folder of their own, and -1 for anything else."""
    return sorted(
        int(path.name[5:]) if path.name[5:].isdigit() else -1 for path in folder.iterdir()
    )
