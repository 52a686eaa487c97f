"""Bytes of shards: mapped from a disk, or fetched by ranges from behind a URL and kept nearby."""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from twinflow_train.files import whole_file
from twinflow_train.place import Place, cause

log = logging.getLogger(__name__)
FIRST_PAUSE = 0.2
"""Seconds before the second attempt at a range; the pauses double."""


@runtime_checkable
class Bytes(Protocol):
    """An open file."""

    def part(self, begin: int, end: int) -> memoryview:
        """Return bytes [begin, end), fewer if the file ends before; writing to them is harmless."""
        ...


class Mapped:
    """A file on a disk, mapped into memory: parts of it are views."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # A private copy of what is written: torch takes no read-only memory without a warning.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else b""

    def part(self, begin: int, end: int) -> memoryview:
        """Return bytes [begin, end) as a view."""
        return memoryview(self._data)[begin:end]


@dataclass(kw_only=True)
class Fetched:
    """A file behind a URL. Safe to ask from several threads.

    attempts: at each range, with pauses that double, before its error is raised.
    """

    place: Place
    cache: Cache | None
    attempts: int

    def part(self, begin: int, end: int) -> memoryview:
        """Return bytes [begin, end), from the cache or the place; OSError after all attempts."""
        key = f"{self.place.path} {begin} {end}"
        found = self.cache.get(key) if self.cache else None
        if found is None:
            found = persistently(lambda: self.place.part(begin, end), self.place, self.attempts)
            if self.cache:
                self.cache.put(key, found)
        return memoryview(bytearray(found))


def persistently(read: Callable[[], bytes], place: Place, attempts: int) -> bytes:
    """Read; on an error that may pass, again after a pause."""
    for attempt in range(attempts):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError as error:
            if attempt == attempts - 1:
                raise
            pause = FIRST_PAUSE * 2**attempt
            log.warning("%s: %s; trying again in %.1f s", place, cause(error), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@dataclass(kw_only=True)
class Cache:
    """Ranges kept in a folder, the longest unused ones thrown away above `limit` bytes.

    Several processes may share the folder; each counts what it has seen of it.
    """

    folder: Path
    limit: int
    _sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [(f.stat(), f.name) for f in self.folder.iterdir() if f.suffix == ".range"]
        for stat, name in sorted(found, key=lambda pair: pair[0].st_mtime):
            self._sizes[name] = stat.st_size

    def get(self, key: str) -> bytes | None:
        """Return what was put under this key, None if it is not there (any more)."""
        name = _name(key)
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        digest, found = data[:32], data[32:]
        if hashlib.sha256(found).digest() != digest:
            return None
        with self._lock:
            self._sizes[name] = len(data)
            self._sizes.move_to_end(name)
        return found

    def put(self, key: str, found: bytes) -> None:
        """Keep bytes under a key. A full disk costs the cache, not the run."""
        name = _name(key)
        try:
            with whole_file(self.folder / name) as unfinished:
                unfinished.write_bytes(hashlib.sha256(found).digest() + found)
        except OSError as error:
            log.warning("nothing more goes into the cache %s: %s", self.folder, cause(error))
            self.limit = 0
        with self._lock:
            self._sizes[name] = len(found) + 32
            self._sizes.move_to_end(name)
            while self._sizes and sum(self._sizes.values()) > self.limit:
                oldest, _ = self._sizes.popitem(last=False)
                (self.folder / oldest).unlink(missing_ok=True)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40] + ".range"
