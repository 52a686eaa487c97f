"""Files and folders that are whole or not there, that others may read, and their checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path`; the file written there takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process id: containers on several nodes that share a folder often have the same ones.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # or a node that loses power leaves an empty file of that name
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` that takes its place when all went well.

    What a killed process left of another attempt is removed: for one process at a time.
    """
    unfinished = folder.with_name(f"{folder.name}.partial")
    retired = folder.with_name(f"{folder.name}.retired")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(retired, ignore_errors=True)
        if folder.exists():
            folder.rename(retired)
        unfinished.rename(folder)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to one safetensors file, readable as the umask says.

    safetensors itself makes files that only their owner may read. With several entries of metadata
    it orders them at random: give one where equal tensors shall give equal bytes.
    """
    path.touch()  # the umask cannot be asked for without changing it, under other threads too
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
