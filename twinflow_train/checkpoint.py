"""Checkpoints of any engine in one format: flat ranges of named tensors in safetensors files.

A checkpoint is a folder `step-XXXXXXXX` with one safetensors file a rank, `index.json` and,
written last, `COMPLETE`. A tensor `KIND/NAME` (kind: model, average or an optimizer moment; name:
as in weight files) is cut into flat ranges, each stored under its name in some file; the index
lists (file, offset, length). So any number of ranks can read what any other number wrote. Nothing
is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded, Span
from twinflow_train.errors import UserError
from twinflow_train.files import save_tensors

VERSION = 1
SEAL = "COMPLETE"
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """How far a run is: all the state that is not in the engine."""

    step: int = 0
    samples: int = 0

    def every(self, steps: int) -> bool:
        """Tell whether something that happens every `steps` steps is due; 0 is never."""
        return steps > 0 and self.step % steps == 0

    def advance(self, samples: int) -> None:
        """Count one optimizer step of `samples` samples."""
        self.step += 1
        self.samples += samples


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one run: written whole or not at all, resumed from the newest whole one.

    folder: where they stand. identity: what defines the run, as nested plain values; a checkpoint
    of another identity is refused. keep: how many of the newest stay.
    """

    folder: Path
    engine: Sharded
    progress: Progress
    world: World
    identity: Mapping[str, Any]
    keep: int = 2
    _saved: int | None = None

    def write(self) -> None:
        """Save the present state, unless this is the step last saved or resumed. Collective."""
        if self._saved == self.progress.step:
            return
        final = self.folder / f"step-{self.progress.step:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.world.main:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        reports = [json.loads(text) for text in self.world.gather_texts(self._write_own(partial))]
        if self.world.main:
            _write_index(partial, self._index_of(reports))
            partial.rename(final)
            self._forget_old()
        self._saved = self.progress.step
        self.world.barrier()

    def resume(self, *, must: bool = False) -> bool:
        """Fill the engine and the progress from the newest whole checkpoint. Collective.

        Returns whether there was one.

        Raises:
            UserError: none and `must`; or one of a run that is defined otherwise.
        """
        for path in self._newest_first():
            index = _index(path)
            if path.suffix or self._damaged(path, index):
                log.warning("skipping %s: incomplete or damaged", path)
                continue
            assert index is not None
            _refuse_other(path, index["run"], self.identity)
            spans = list(self.engine.spans())
            if extra := sorted(index["tensors"].keys() - {_key(span) for span in spans}):
                raise UserError(
                    f"{path} is a checkpoint of another model: it has {len(extra)} tensors too "
                    f"many: {', '.join(extra[:10])}"
                )
            for span in spans:
                _read(path, index, span)
            self.engine.restored(index["updates"])
            self.progress.__dict__.update(index["progress"])
            self._saved = self.progress.step
            return True
        if must:
            raise UserError(f"resume=must: {self.folder} holds no whole checkpoint")
        return False

    def _write_own(self, folder: Path) -> str:
        """Write this rank's ranges and report them as JSON."""
        name = f"rank-{self.world.rank:05d}.safetensors"
        spans = [span for span in self.engine.spans() if span.local.numel()]
        save_tensors({_key(s): s.local.detach().cpu() for s in spans}, folder / name)
        pieces = {_key(s): [s.shape, str(s.local.dtype), s.offset, s.local.numel()] for s in spans}
        return json.dumps({"file": name, "sha256": sha256(folder / name), "pieces": pieces})

    def _index_of(self, reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        files: dict[str, str] = {}
        for report in reports:
            files[report["file"]] = report["sha256"]
            for key, (shape, dtype, offset, length) in report["pieces"].items():
                entry = tensors.setdefault(key, {"shape": shape, "dtype": dtype, "pieces": []})
                entry["pieces"].append([report["file"], offset, length])
        return {
            "version": VERSION,
            "progress": asdict(self.progress),
            "updates": self.engine.updates,
            "run": self.identity,
            "files": files,
            "tensors": tensors,
        }

    def _newest_first(self) -> list[Path]:
        """List checkpoint folders; every rank gets rank 0's list."""
        names = sorted((p.name for p in self.folder.glob("step-????????*")), reverse=True)
        shared: list[str] = json.loads(self.world.gather_texts(json.dumps(names))[0])
        return [self.folder / name for name in shared]

    def _damaged(self, path: Path, index: dict[str, Any] | None) -> bool:
        """Check every file's SHA-256, the files divided among the ranks. Collective."""
        files = sorted(index["files"].items()) if index else []
        mine = files[self.world.rank :: self.world.size]
        return self.world.any(
            index is None
            or any(not (path / f).is_file() or sha256(path / f) != want for f, want in mine)
        )

    def _forget_old(self) -> None:
        """Remove all but the newest checkpoints up to this step, and what is only half written."""
        present = sorted(self.folder.glob("step-????????"))
        now = f"step-{self.progress.step:08d}"
        whole = [p.name for p in present if p.name <= now and _index(p) is not None]
        for old in self.folder.glob("step-*"):
            if old.name not in whole[-self.keep :] and (old.suffix or old.name <= now):
                # Unsealed first: killed in between, it is no checkpoint any more.
                (old / SEAL).unlink(missing_ok=True)
                shutil.rmtree(old)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(span: Span) -> str:
    return f"{span.kind}/{span.name}"


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(index))
    (folder / SEAL).write_bytes(_seal(path.read_bytes()))


def _seal(index: bytes) -> bytes:
    """Return what says that an index, of the version it names, was written to its end."""
    seal = {"version": json.loads(index)["version"], "index": hashlib.sha256(index).hexdigest()}
    return json.dumps(seal).encode()


def _index(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's index, None if it was not written to its end or has been changed."""
    try:
        seal, text = (folder / SEAL).read_bytes(), (folder / "index.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if hashlib.sha256(text).hexdigest().encode() not in seal or seal != _seal(text):
        return None
    index: dict[str, Any] = json.loads(text)
    if index["version"] > VERSION:
        raise UserError(f"{folder} is of format {index['version']}; this program reads {VERSION}")
    return index


def _refuse_other(path: Path, stored: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    there, here = dict(_flatten(stored)), dict(_flatten(ours))
    changed = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if changed:
        named = ", ".join(f"{k} ({there.get(k)} -> {here.get(k)})" for k in changed[:10])
        raise UserError(
            f"{path} belongs to another run; changed: {named}. "
            "Choose another name=, undo the change, or begin anew with resume=never"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path, index: dict[str, Any], span: Span) -> None:
    """Copy into a live span whatever of it each file holds."""
    if not span.local.numel():
        return
    entry = index["tensors"].get(_key(span))
    if entry is None or tuple(entry["shape"]) != span.shape:
        there = None if entry is None else tuple(entry["shape"])
        raise UserError(
            f"{path} is a checkpoint of another model: {_key(span)} has shape {there} there, "
            f"{span.shape} here"
        )
    begin, end, found = span.offset, span.offset + span.local.numel(), 0
    for file, offset, length in entry["pieces"]:
        low, high = max(begin, offset), min(end, offset + length)
        if low < high:
            stored = _slice(path / file, _key(span), low - offset, high - offset)
            span.local[low - begin : high - begin].copy_(stored)
            found += high - low
    if found != end - begin:
        raise UserError(f"{path}: {found} of {end - begin} numbers of {_key(span)} are there")


def _slice(path: Path, key: str, start: int, stop: int) -> Tensor:
    with safe_open(path, framework="pt") as file:
        part: Tensor = file.get_slice(key)[start:stop]
    return part
