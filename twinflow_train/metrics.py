"""Where a run's numbers go: `metrics.jsonl`, a progress bar and, if wanted, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.scrub import scrub

log = logging.getLogger(__name__)
FILE = "metrics.jsonl"
PATIENCE_SECONDS = 30
"""How long W&B may take to answer at the start, and to send what is left at the end."""


class Sink:
    """A tracker outside the run folder; this one drops everything."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers."""

    def picture(self, step: int, name: str, path: Path, *, caption: str = "") -> None:
        """Take an image file."""

    def artifact(self, name: str, folder: Path) -> None:
        """Take a folder of weights, if that is wanted."""

    def close(self) -> None:
        """Finish."""


@dataclass(kw_only=True)
class Tracking:
    """A tracker: the `tracking` group of the configuration."""

    def open(self, *, name: str, folder: Path, config: Mapping[str, Any]) -> Sink:
        """Start tracking a run."""
        return Sink()


@dataclass(kw_only=True)
class NoTracking(Tracking):
    """Only `metrics.jsonl` and the pictures in the run folder."""


@dataclass(kw_only=True)
class WandB(Tracking):
    """Weights & Biases. mode: offline (needs no account; sync later), online or disabled.

    An online run that does not reach the server goes on offline. A run that is continued keeps its
    W&B id, and steps taken again have the same place on the axis of steps. artifacts: whether the
    exported weights are sent too.
    """

    project: str = "twinflow"
    entity: str | None = None
    mode: str = "offline"
    tags: list[str] = field(default_factory=list)
    artifacts: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "disabled"):
            raise ValueError(f"tracking.mode must be offline, online or disabled, got {self.mode}")

    def open(self, *, name: str, folder: Path, config: Mapping[str, Any]) -> Sink:
        """Start a W&B run; its files go to the run folder."""
        return _WandBSink(self, name=name, folder=folder, config=config)


class _WandBSink(Sink):
    def __init__(
        self, options: WandB, *, name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        # Heavy: only where it is wanted.
        import wandb

        self._wandb, self._artifacts = wandb, options.artifacts

        def start(mode: str) -> Any:
            return wandb.init(
                id=_identity(folder),
                resume="allow" if mode == "online" else None,
                project=options.project,
                entity=options.entity,
                mode=mode,  # type: ignore[arg-type]
                tags=options.tags,
                name=name,
                dir=str(folder),
                config=scrub(dict(config)),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_meta=True,  # or it keeps the command line, with URLs' credentials
                    init_timeout=PATIENCE_SECONDS,
                    finish_timeout=PATIENCE_SECONDS,
                ),
            )

        try:
            try:
                self._run = start(options.mode)
            except wandb.errors.CommError as error:
                if isinstance(error, wandb.errors.AuthenticationError):
                    raise
                log.warning("W&B cannot be reached (%s): tracking goes on offline", _line(error))
                wandb.teardown()  # its service takes the id for one that is in use
                self._run = start("offline")
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking.mode={options.mode}: W&B does not start, run `wandb login` or choose "
                f"tracking.mode=offline or tracking=none ({_line(error)})"
            ) from error
        # Our own step is the axis: a resumed run continues on it, also as a new offline run.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: Path, *, caption: str = "") -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path), caption=caption or None)})

    def artifact(self, name: str, folder: Path) -> None:
        if self._artifacts:
            found = self._wandb.Artifact(_letters(name), type="model")
            found.add_dir(str(folder))
            self._run.log_artifact(found)

    def close(self) -> None:
        self._run.finish()


def _identity(folder: Path) -> str:
    """Return the id of a run folder's W&B run, the same for each of its processes."""
    path = folder / "wandb" / "id"
    if not path.is_file():
        with whole_file(path) as unfinished:
            unfinished.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _letters(name: str) -> str:
    """Return a name of the letters that artifacts may have."""
    return re.sub(r"[^\w.-]", "-", name)[:100] or "run"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Spare(Sink):
    """A tracker that training can do without: its first failure is told, and is its end."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._sink.write(step, values))

    def picture(self, step: int, name: str, path: Path, *, caption: str = "") -> None:
        self._try(lambda: self._sink.picture(step, name, path, caption=caption))

    def artifact(self, name: str, folder: Path) -> None:
        self._try(lambda: self._sink.artifact(name, folder))

    def close(self) -> None:
        self._try(self._sink.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            log.warning("tracking has failed, and ends: %s (%s has all)", _line(error), FILE)
            self._sink = Sink()


class _Lines:
    """A file that grows by lines; where the disk is full they wait in memory, in their order."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._told = path, b"", False
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Write a line, and what waits before it, as far as there is room."""
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._told:
                log.warning("%s cannot be written, lines wait: %s", self._path, error.strerror)
            self._told = True
        else:
            self._told = False

    def cut(self, step: int) -> None:
        """Drop the lines from a step on."""
        self.close()
        try:
            cut(self._path, step)
        except OSError as error:
            log.warning("%s keeps lines from step %d on: %s", self._path, step, error.strerror)
        self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """Try once more what waits, and close the file."""
        self.append("")
        if self._waiting:
            log.warning("%s lacks its last %d bytes", self._path, len(self._waiting))
        self._waiting = b""
        self._file.close()


@dataclass(kw_only=True)
class Log:
    """One run's log. Only the main process writes; the others' calls do nothing."""

    sink: Sink
    file: _Lines | None
    bar: tqdm | None
    every: int = 1
    began: float = field(default_factory=time.perf_counter)
    evaluating: float = 0.0
    failures: int = 0

    def write(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Write one line of numbers that belong to the state after `step` steps."""
        if self.file is None:
            return
        self.evaluating += values.get("time/eval", 0.0)
        self.failures += int(values.get("eval/failed", 0.0))
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.file.append(json.dumps({"step": step, "samples": samples, **finite}) + "\n")
        self.sink.write(step, values)

    def evaluated(self) -> str:
        """Say which share of the time since the start went into evaluations."""
        whole = time.perf_counter() - self.began
        failed = f"; {self.failures} of them failed" if self.failures else ""
        return (
            f"evaluations took {self.evaluating:,.1f} s, {self.evaluating / whole:.0%} of the "
            f"time{failed}"
        )

    def picture(self, step: int, name: str, path: Path, *, caption: str = "") -> None:
        """Pass on an image file."""
        if self.file is not None and path.is_file():
            self.sink.picture(step, name, path, caption=caption)

    def artifact(self, name: str, folder: Path) -> None:
        """Pass on a folder of weights."""
        if self.file is not None:
            self.sink.artifact(name, folder)

    def tell(self, text: str) -> None:
        """Print a line of text above the progress bar."""
        if self.bar is not None:
            self.bar.write(text)

    def stepped(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Move the progress bar by one step, and write its numbers every `every` steps."""
        if self.bar is None:
            return
        shown = {k: f"{values[k]:.3g}" for k in ("loss/total", "norm/grad") if k in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.every and step % self.every == 0:
            self.write(step, samples, values)

    def rewind(self, step: int) -> None:
        """Go on from an earlier step: what is about to be made again is dropped."""
        if self.file is not None:
            self.file.cut(step)
        if self.bar is not None:
            self.bar.n = step
            self.bar.refresh()


@contextmanager
def open_log(
    tracking: Tracking,
    *,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    world: World,
    step: int,
    steps: int,
    every: int,
) -> Iterator[Log]:
    """Open the log of a run that is about to take step `step` of `steps`.

    Lines at or after that step are cut from `metrics.jsonl`: they are about to be made again.
    """
    if not world.main:
        yield Log(sink=Sink(), file=None, bar=None)
        return
    path = folder / FILE
    cut(path, step)
    sink = _Spare(tracking.open(name=name, folder=folder, config=config))
    bar = tqdm(total=steps, initial=step, desc=name, unit="step", dynamic_ncols=True, mininterval=1)
    try:
        # Else a warning would be written into the line of the bar.
        with closing(_Lines(path)) as file, bar, logging_redirect_tqdm():
            yield Log(sink=sink, file=file, bar=bar, every=every)
    finally:
        sink.close()


def cut(path: Path, step: int) -> None:
    """Drop the lines of steps from `step` on, and a last line that was not written to its end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            keep = line.endswith("\n") and json.loads(line)["step"] < step
        except json.JSONDecodeError:
            log.warning("dropping a damaged line of %s", path)
            keep = False
        if keep:
            kept.append(line)
    with whole_file(path) as unfinished:
        unfinished.write_text("".join(kept))
