"""The folder of one run: made, locked, and told what made it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import twinflow_train
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.scrub import scrub

MANIFEST = "manifest.json"
ROOM = 64 << 10
"""Bytes that have to be free at a start."""
LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed", "webdataset", "hydra-core", "wandb")


@contextmanager
def run_folder(path: str, world: World) -> Iterator[Path]:
    """Make a run's folder and keep other jobs out of it until the end. Collective.

    Raises:
        UserError: it cannot be written, the disk is full, or another job runs in it.
    """
    folder = Path(path)
    problem = ""
    lock = None
    if world.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _probe(folder / ".probe")
        except BlockingIOError:
            problem = "another job is running in it; wait for it or choose another name="
        except OSError as error:
            problem = f"it cannot be written ({error.strerror}); choose another folder="
    problem = world.gather_texts(problem)[0]
    if problem:
        raise UserError(f"folder {folder}: {problem}")
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()


def _probe(path: Path) -> None:
    """Write a file as large as what stands beside checkpoints; OSError where there is no room."""
    try:
        path.write_bytes(bytes(ROOM))
    finally:
        path.unlink(missing_ok=True)


def set_aside(folder: Path, world: World) -> None:
    """Move what an earlier run left in its folder to `before-N`, so that a new one begins clean."""
    if world.main:
        kept = [p for p in folder.iterdir() if p.name != ".lock" and not _set_aside.match(p.name)]
        there = [int(m[1]) for p in folder.iterdir() if (m := _set_aside.match(p.name))]
        number = 1 + max(there, default=0)
        if kept:
            (folder / f"before-{number}").mkdir()
        for path in kept:
            path.rename(folder / f"before-{number}" / path.name)
    world.barrier()


_set_aside = re.compile(r"before-(\d+)$")


def write_manifest(
    folder: Path,
    config: Mapping[str, Any],
    yaml: str,
    about: Sequence[Mapping[str, Any]],
    world: World,
) -> None:
    """Write down what the run is: its configuration, command, code and library versions.

    about: what there is to know about each set of its data.
    """
    if not world.main:
        return
    manifest = {
        "config": config,
        "data": about,
        "command": sys.argv,
        "ranks": world.size,
        "device": str(world.device),
        "twinflow_train": twinflow_train.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    texts = {"config.yaml": scrub(yaml), MANIFEST: json.dumps(scrub(manifest), indent=2)}
    for name, text in texts.items():
        with whole_file(folder / name) as unfinished:
            unfinished.write_text(text.rstrip() + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what `write_manifest` wrote; UserError if the folder is not a run's."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path} is missing: give a run's folder")
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def about_code(folder: Path) -> dict[str, Any]:
    """Return what a run's manifest says of the code and the libraries that it began with."""
    said = read_manifest(folder)
    return {"code": {key: said[key] for key in ("twinflow_train", "commit", "libraries")}}


def _commit() -> str | None:
    """Return the checkout's commit, None outside a checkout or without git."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
