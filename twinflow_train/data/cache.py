"""What was fetched from behind a URL, kept in a folder that several processes share."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

from twinflow_train.place import cause

log = logging.getLogger(__name__)
WHOLE, UNFINISHED = ".range", ".tmp"
"""How the names of entries end."""
DIGEST = 32
"""Bytes of the checksum that an entry begins with."""
SLACK = 0.1
"""Part of the limit that is freed at once when the folder is full."""
ABANDONED = 3600
"""Seconds after which a file that nobody finished is removed."""


@dataclass(kw_only=True)
class Cache:
    """Bytes under keys, in files of a folder that never takes more than `limit` bytes.

    What was used longest ago goes first. Safe for several threads and processes.
    """

    folder: Path
    limit: int

    def get(self, key: str) -> bytes | None:
        """Return what was put under a key; None if it is not there (any more) or damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        found = data[DIGEST:]
        return found if hashlib.sha256(found).digest() == data[:DIGEST] else None

    def put(self, key: str, found: bytes) -> None:
        """Keep bytes under a key. What goes wrong costs the cache, not the run."""
        try:
            self._write(self._path(key), [hashlib.sha256(found).digest(), found])
        except OSError as error:
            log.warning("data.cache: nothing more goes into %s: %s", self.folder, cause(error))
            self.limit = 0

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{WHOLE}"

    def _write(self, path: Path, parts: list[bytes]) -> None:
        size = sum(map(len, parts))
        if size > self.limit * (1 - SLACK):
            return
        unfinished = path.with_suffix(f".{uuid4().hex}{UNFINISHED}")
        try:
            with self._counter() as counter:
                said = counter.read()
                taken = int(said) if said.isdigit() else self.limit
                if taken + size > self.limit:
                    taken = self._make_room(int(self.limit * (1 - SLACK)) - size)
                room = taken + size <= self.limit
                counter.truncate(0)
                counter.write(str(taken + room * size))
                if room:  # it is as large as it will be before another may look
                    with unfinished.open("wb") as file:
                        file.truncate(size)
            if room:
                with unfinished.open("r+b") as file:
                    file.writelines(parts)
                with self._counter():  # or who counts just then would see neither name
                    unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @contextmanager
    def _counter(self) -> Iterator[IO[str]]:
        """Open the file that says how much is taken, or more, for one thread of all at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "taken").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file

    def _make_room(self, most: int) -> int:
        """Throw away what was used longest ago until `most` bytes are left; return how many are."""
        taken, old, now = 0, [], time.time()
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # somebody tidies up
                stat = entry.stat()
                taken += stat.st_size
                abandoned = entry.name.endswith(UNFINISHED) and stat.st_mtime < now - ABANDONED
                if entry.name.endswith(WHOLE) or abandoned:
                    old.append((stat.st_mtime_ns, stat.st_size, entry.path))
        for _, size, path in sorted(old):
            if taken <= most:
                break
            Path(path).unlink(missing_ok=True)
            taken -= size
        return taken
