"""Where things stand: paths on a disk or behind a URL, with the same few verbs."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from twinflow_train.errors import UserError
from twinflow_train.scrub import scrub

CHUNK = 1 << 24
"""Bytes that are read or written at once."""
PATIENCE = 60
"""Seconds that a file or a range of one may take to come from behind a URL."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Let whatever a driver raises be an OSError, as what a disk raises is."""
    foreign: Exception | None = None
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - every driver has errors of its own
        foreign = error
    if foreign is not None:
        raise OSError(f"{type(foreign).__name__}: {foreign}") from foreign


def cause(error: BaseException) -> str:
    """Say in a few words what went wrong, without credentials."""
    told = error.strerror if isinstance(error, OSError) else None
    if not told and isinstance(error, FileNotFoundError):
        told = "No such file"  # drivers say its name only
    if not told and isinstance(error, TimeoutError):
        told = f"no answer in {PATIENCE} seconds"
    said: str = scrub(told or str(error) or type(error).__name__)
    return " ".join(said.split())


def readable(size: int) -> str:
    """Write a number of bytes for people."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= one:
            return f"{size / one:,.2f} {unit}"
    return f"{size} bytes"


@dataclass(frozen=True)
class Place:
    """A file or folder. `shown` is how it is written for people, without credentials."""

    driver: Any
    path: str
    shown: str

    @staticmethod
    def of(where: str | Path) -> Place:
        """Find the driver of a path or URL; UserError if there is none."""
        shown = scrub(str(where)).rstrip("/") or "/"
        try:
            driver, path = fsspec.core.url_to_fs(where)
        except ImportError as error:
            raise UserError(f"{shown} needs a package that is missing: {error}") from error
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{shown} cannot be opened: {cause(error)}") from error
        return Place(driver, path.rstrip("/") or "/", shown)

    def __truediv__(self, name: str) -> Place:
        return Place(self.driver, f"{self.path.rstrip('/')}/{name}", f"{self.shown}/{name}")

    def __str__(self) -> str:
        return self.shown

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def local(self) -> bool:
        """Whether it is on a disk, where a folder can be renamed at once."""
        return isinstance(self.driver, LocalFileSystem)

    @plain_errors()
    def names(self) -> list[str]:
        """List what stands in this folder, sorted; nothing if there is no such folder."""
        self.driver.invalidate_cache()
        try:
            paths = [str(path).rstrip("/") for path in self.driver.ls(self.path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(p.rpartition("/")[2] for p in paths if p.lstrip("/") != self.path.lstrip("/"))

    @plain_errors()
    def exists(self) -> bool:
        """Tell whether there is such a file or folder."""
        self.driver.invalidate_cache()
        return bool(self.driver.exists(self.path))

    @plain_errors()
    def read(self) -> bytes:
        """Return all of a file; of a large one, parts."""
        found: bytes = self.driver.cat_file(self.path, **self._patience())
        return found

    @plain_errors()
    def part(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end` of a file; safe to ask from several threads."""
        found: bytes = self.driver.cat_file(self.path, start=begin, end=end, **self._patience())
        return found

    def _patience(self) -> dict[str, int]:
        return {"timeout": PATIENCE} if self.driver.async_impl else {}

    @plain_errors()
    def sha256(self) -> str:
        """Return a file's SHA-256 in hexadecimal."""
        digest = hashlib.sha256()
        with self.driver.open(self.path, "rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
        return digest.hexdigest()

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open a file for reading ranges of it."""
        with plain_errors():
            file = self.driver.open(self.path, "rb", block_size=2 * CHUNK)
        try:
            yield Reader(file)
        finally:
            file.close()

    @plain_errors()
    def make(self) -> None:
        """Make this folder, if it is not there."""
        self.driver.makedirs(self.path, exist_ok=True)

    @plain_errors()
    def write(self, parts: Iterable[bytes | memoryview]) -> str:
        """Write a file of these parts and return its SHA-256; it is on the disk then."""
        digest = hashlib.sha256()
        with self.driver.open(self.path, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            if self.local:
                file.flush()
                os.fsync(file.fileno())
        return digest.hexdigest()

    @plain_errors()
    def remove(self) -> None:
        """Remove a file, or a folder with all in it, if there is one."""
        try:
            self.driver.rm(self.path, recursive=True)
        except FileNotFoundError:
            return

    def room(self) -> int | None:
        """Return how many bytes are free where this is on a disk, None behind a URL."""
        if not self.local:
            return None
        above = next(path for path in (Path(self.path), *Path(self.path).parents) if path.exists())
        return shutil.disk_usage(above).free

    def rename(self, name: str) -> None:
        """Give a folder on a disk another name beside it, at once."""
        Path(self.path).rename(Path(self.path).with_name(name))


@dataclass(frozen=True)
class Reader:
    """An open file, read by ranges."""

    file: Any

    @plain_errors()
    def read(self, begin: int, end: int) -> bytearray:
        """Return the bytes from `begin` to `end`, fewer if the file ends before."""
        self.file.seek(begin)
        found = bytearray()
        while len(found) < end - begin and (part := self.file.read(end - begin - len(found))):
            found += part
        return found

    @plain_errors()
    def size(self) -> int:
        """Return the file's size in bytes."""
        size: int = self.file.seek(0, os.SEEK_END)
        return size
