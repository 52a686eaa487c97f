"""One checkpoint on its way to the disk, in a thread of its own."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twinflow_train.checkpoint.copying import HostCopy
from twinflow_train.checkpoint.index import SEAL, build, reported, seal
from twinflow_train.dist import World
from twinflow_train.place import Place, cause

PARTIAL = ".partial"
NAME = re.compile(r"step-(\d{8,})(?:\.partial)?")
log = logging.getLogger(__name__)


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder, whole or partial; None for any other name."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None


@dataclass(kw_only=True)
class Keep:
    """Which checkpoints stay: the `newest`, and for ever those at multiples of `every`, if any."""

    newest: int
    every: int = 0

    def old(self, whole: Iterable[int]) -> list[int]:
        """List the steps that may go, of those that have a whole checkpoint."""
        steps = sorted(whole)[: -self.newest]
        return [step for step in steps if not self.every or step % self.every]


@dataclass(kw_only=True)
class Save:
    """The saving of one state: each rank writes its file, then the main one seals the folder.

    top: where the run's checkpoints stand. copy: this rank's part. world: a group that no other
    thread uses. state: what the index says of the whole ("progress", "updates" and "run").
    problem: why it failed, for people, the same on every rank; may be known from the start.
    """

    top: Place
    copy: HostCopy
    world: World
    keep: Keep
    state: Mapping[str, Any]
    problem: str = ""
    seconds: float = 0.0
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._step: int = self.state["progress"]["step"]
        self._name = f"step-{self._step:08d}"
        # An object store cannot rename: there only the seal tells what is whole.
        self._folder = self.top / (self._name + PARTIAL if self.top.local else self._name)
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not come to its end."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Return when it has come to its end."""
        self._thread.join()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self.problem = self._agree()
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to
            self.problem = f"{self._folder}: {cause(error)}"
        self.seconds = time.perf_counter() - began

    def _agree(self) -> str:
        """Write, tell each other, and seal or discard; return the problem that all agree on."""
        report, problem = {}, self.problem
        try:
            report = {} if problem else self._write_own()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            problem = f"{self._folder}: {cause(error)}"
        told = self.world.gather_texts(json.dumps({"report": report, "problem": problem}))
        ranks = [json.loads(text) for text in told]
        problems = [f"{r['problem']} (rank {n})" for n, r in enumerate(ranks) if r["problem"]]
        problem = problems[0] if problems else ""
        if self.world.main:
            problem = problem or self._seal([r["report"] for r in ranks])
            if problem:
                self._discard(problem)
            else:
                self._forget_old()
        return self.world.gather_texts(problem)[0]

    def _write_own(self) -> dict[str, Any]:
        """Write this rank's file and report it."""
        file = f"rank-{self.world.rank:05d}.safetensors"
        self._folder.make()
        digest = (self._folder / file).write(self.copy.parts())
        return {"file": file, "sha256": digest, "pieces": reported(self.copy.pieces)}

    def _seal(self, reports: list[dict[str, Any]]) -> str:
        """Make a checkpoint of the ranks' files; return what forbids it."""
        try:
            mine = {report["file"] for report in reports}
            for name in self._folder.names():
                if name not in mine:  # of an attempt that died
                    (self._folder / name).remove()
            seal(self._folder, build(reports, **self.state))
            if self._folder.name != self._name:
                (self.top / self._name).remove()
                self._folder.rename(self._name)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            return f"{self._folder}: {cause(error)}"
        return ""

    def _discard(self, problem: str) -> None:
        """Warn, and make room: what is not whole is of no use."""
        log.warning(
            "step %d was NOT saved: %s. Training goes on, earlier checkpoints stay, "
            "and the next save tries again",
            self._step,
            problem,
        )
        try:
            (self._folder / SEAL).remove()
            self._folder.remove()
        except OSError as error:
            log.warning("%s cannot be removed: %s", self._folder, cause(error))

    def _forget_old(self) -> None:
        """Remove checkpoints up to this step that need not stay, and what is half written."""
        try:
            steps = {name: n for name in self.top.names() if (n := step_of(name)) is not None}
            whole = {
                step
                for name, step in steps.items()
                if not name.endswith(PARTIAL) and (self.top / name / SEAL).exists()
            }
            past = {step for step in whole if step <= self._step}
            kept = whole.difference(self.keep.old(past))
            for name, step in steps.items():
                if name.endswith(PARTIAL) or (step <= self._step and step not in kept):
                    # Unsealed first: killed in between, it is no checkpoint any more.
                    (self.top / name / SEAL).remove()
                    (self.top / name).remove()
        except OSError as error:
            log.warning("old checkpoints in %s cannot be removed: %s", self.top, cause(error))
