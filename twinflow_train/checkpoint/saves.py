"""The checkpoints of one run: saved beside the training, resumed from the newest whole one.

A checkpoint is a folder `step-XXXXXXXX` with one safetensors file a rank, `index.json` and,
written last, `COMPLETE`. A tensor `KIND/NAME` (kind: model, an average or an optimizer moment;
name: as in weight files) is cut into flat ranges, each stored under its name in some file; the
index lists (file, offset, length). So any number of ranks can read what any other number wrote.
Nothing is a pickle.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from twinflow_train.checkpoint.copying import HostCopy, key_of
from twinflow_train.checkpoint.index import Index, damage, refuse_other_model, refuse_other_run
from twinflow_train.checkpoint.ranges import DamageError, RangeFile
from twinflow_train.checkpoint.saving import PARTIAL, Keep, Save, step_of
from twinflow_train.dist import World
from twinflow_train.engines.base import Span
from twinflow_train.errors import UserError
from twinflow_train.faults import Record
from twinflow_train.place import Place, cause, readable

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """How far a run is: all the state that is not in the engine.

    faults: what it remembers of them, so that it acts on them alike wherever it was interrupted.
    """

    step: int = 0
    samples: int = 0
    faults: Record = field(default_factory=Record)

    @property
    def position(self) -> int:
        """The number of the step's data and randomness: rollbacks pass some over."""
        return self.step + self.faults.passed

    def every(self, steps: int) -> bool:
        """Tell whether something that happens every `steps` steps is due; 0 is never."""
        return steps > 0 and self.step % steps == 0

    def advance(self, samples: int) -> None:
        """Count one optimizer step of `samples` samples."""
        self.step += 1
        self.samples += samples

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Be what `asdict` made of a progress."""
        self.step, self.samples = stored["step"], stored["samples"]
        vars(self.faults).update(vars(Record.of(stored["faults"])))


class State(Protocol):
    """What checkpoints ask of an engine (see `Sharded`)."""

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        ...

    def spans(self) -> Iterator[Span]:
        """Yield every part of the state that this rank holds, the same names on every rank."""
        ...

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled."""
        ...


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one run, each written whole or not at all. Made by all ranks together.

    folder: a path or URL. identity: what defines the run, as nested plain values; a checkpoint
    of another identity is refused. defaults: values of the identity's keys where an older program
    did not write them yet. keep, keep_every: see `Keep`. patience_seconds: for the
    slowest rank's part, once one has written its own.
    """

    folder: Path | str
    engine: State
    progress: Progress
    world: World
    identity: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 2
    keep_every: int = 0
    patience_seconds: float = 3600.0

    def __post_init__(self) -> None:
        self._top = Place.of(self.folder)
        self._aside = self.world.aside(patience_seconds=self.patience_seconds)
        self._copy = HostCopy(pinned=self.world.device.type == "cuda")
        # The step last saved, being saved or resumed. Step 0 needs none: a start makes it again.
        self._last: int | None = 0
        self._save: Save | None = None
        self._problem = ""
        self._figures: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whatever ends the run, what is under way gets to the disk; a second Ctrl-C means it.
        if kind is not KeyboardInterrupt:
            self._finish()

    def banner(self) -> str:
        """Say how large a checkpoint is and where it goes. Collective."""
        mine = sum(span.local.nbytes for span in self.engine.spans() if span.mine)
        size = sum(map(int, self.world.gather_texts(str(mine))))
        room = self._top.room()
        free = "" if room is None else f", {readable(room)} free"
        return (
            f"a checkpoint: {readable(size)} to {self._top}{free}, "
            f"by way of {readable(mine)} of host memory a rank"
        )

    def write(self) -> None:
        """Begin to save the present state, unless it is on the disk or on its way. Collective.

        Returns when the state is copied to host memory (see `HostCopy`) and may change; waits
        before that for an earlier save that is still under way. A save that fails is warned of,
        and costs nothing that was saved before.
        """
        if self._last == self.progress.step:
            return
        began = time.perf_counter()
        self._finish()
        problem = ""
        try:
            self._copy.reserve(self.engine.spans())
        except (MemoryError, RuntimeError) as error:
            problem = f"there is no host memory for a copy of the state: {cause(error)}"
        if not problem:
            self._copy.take(self.engine.spans())
        self._save = Save(
            top=self._top,
            copy=self._copy,
            world=self._aside,
            keep=Keep(newest=self.keep, every=self.keep_every),
            state={
                "progress": asdict(self.progress),
                "updates": self.engine.updates,
                "run": self.identity,
            },
            problem=problem,
        )
        self._last = self.progress.step
        self._figures["time/save_stall"] = time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            UserError: it failed; alike on every rank.
        """
        self._finish()
        if self._problem:
            raise UserError(
                f"the last save failed: {self._problem}. Earlier checkpoints are whole: make room "
                "or mend the place, and start again from there"
            )

    def figures(self) -> dict[str, float]:
        """Give the seconds that the last save took of training, and, when known, in all."""
        if self._save is not None and not self._save.running:
            self._finish()
        return dict(self._figures)

    def resume(self, *, must: bool = False, up_to: int | None = None) -> bool:
        """Fill the engine and the progress from the newest whole checkpoint. Collective.

        up_to: the greatest step that it may be of. Returns whether there was one.

        Raises:
            UserError: none and `must`; or one of a run that is defined otherwise; or one that
                cannot be read.
        """
        self._finish()
        for name in self._newest_first():
            if up_to is not None and (step_of(name) or 0) > up_to:
                continue
            index = self._whole(self._top / name)
            if index is None:
                continue
            self._fill(index)
            self.engine.restored(index.updates)
            self.progress.restore(index.progress)
            self._last = self.progress.step
            return True
        if must:
            raise UserError(f"resume=must: {self._top} holds no whole checkpoint")
        return False

    def _finish(self) -> None:
        """Wait for the save that is under way, and take note of how it went."""
        if self._save is None:
            return
        self._save.wait()
        self._problem, self._figures["time/save"] = self._save.problem, self._save.seconds
        if self._problem:
            self._last = None
        self._save = None

    def _newest_first(self) -> list[str]:
        """List checkpoints; every rank gets rank 0's list."""
        names = self._top.names() if self.world.main else []
        shared: list[str] = json.loads(self.world.gather_texts(json.dumps(names))[0])
        steps = [(step, name) for name in shared if (step := step_of(name)) is not None]
        return [name for _, name in sorted(steps, reverse=True)]

    def _whole(self, folder: Place) -> Index | None:
        """Read and verify a checkpoint, its files divided among the ranks; warn of a damaged one.

        Raises:
            UserError: it is of another run or model, or cannot be read. Alike on every rank.
        """
        index, fault, refused = None, "", ""
        try:
            if folder.name.endswith(PARTIAL):
                raise DamageError(f"{folder} was not written to its end")
            index = Index.read(folder)
            refuse_other_run(folder, index.run, self.identity, defaults=self.defaults)
            refuse_other_model(index, {key_of(s): s.shape for s in self.engine.spans()})
            mine = sorted(index.files)[self.world.rank :: self.world.size]
            fault = damage(index, mine)
        except DamageError as error:
            fault = str(error)
        except UserError as error:
            refused = str(error)
        except OSError as error:
            refused = f"{folder} cannot be read: {cause(error)}; nothing was changed"
        faults, refusals = zip(
            *(json.loads(t) for t in self.world.gather_texts(json.dumps([fault, refused]))),
            strict=True,
        )
        if found := [text for text in refusals if text]:
            raise UserError(found[0])
        if found := [text for text in faults if text]:
            if self.world.main:
                log.warning("skipping %s, incomplete or damaged: %s", folder, found[0])
            return None
        return index

    def _fill(self, index: Index) -> None:
        """Copy into the live spans what the files hold of them, one file after the other."""
        spans = {key_of(span): span for span in self.engine.spans()}
        parts: dict[str, list[tuple[str, int, int, int]]] = {}
        for key, span in spans.items():
            begin, end = span.offset, span.offset + span.local.numel()
            for file, offset, length in index.tensors[key]["pieces"]:
                low, high = max(begin, offset), min(end, offset + length)
                if low < high:
                    parts.setdefault(file, []).append((key, low - begin, low - offset, high - low))
        for file, wanted in parts.items():
            with RangeFile.open(index.folder / file) as opened:
                for key, to, start, length in wanted:
                    for part in opened.parts(key, start, start + length):
                        spans[key].local[to : to + len(part)].copy_(part)
                        to += len(part)


def refuse_unusable(folder: str, *, empty: bool, world: World) -> None:
    """Raise UserError if some rank cannot write there, or, with `empty`, if checkpoints are there.

    Alike on every rank; collective.
    """
    problems = world.gather_texts(_unusable(folder, empty=empty, rank=world.rank))
    if found := [text for text in problems if text]:
        raise UserError(f"checkpoints={found[0]}; mend it or choose another place")


def _unusable(folder: str, *, empty: bool, rank: int) -> str:
    """Try a place and say why it cannot take a run's checkpoints; empty if it can."""
    try:
        top = Place.of(folder)
    except UserError as error:
        return str(error)
    probe = top / f".probe-{rank}"
    try:
        top.make()
        probe.write([b"can this be written?"])
        probe.remove()
        used = any(step_of(name) is not None for name in top.names())
    except OSError as error:
        return f"{top} cannot be written: {cause(error)}"
    if empty and used:
        return f"{top} holds an earlier run, which resume=never would mix with this one"
    return ""
