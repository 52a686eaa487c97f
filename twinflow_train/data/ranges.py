"""Bytes of shards: read from a disk, or fetched by ranges from behind a URL and kept nearby."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from twinflow_train.data.cache import Cache
from twinflow_train.data.kept import Failed
from twinflow_train.place import Place, cause

log = logging.getLogger(__name__)
FIRST_PAUSE = 0.2
"""Seconds before the second attempt at a range; the pauses double."""
LONGEST = 120
"""Seconds after which nothing is tried once more: the other ranks wait for ten minutes at most."""
Copy = Callable[[int, Sequence[memoryview]], None]
"""Copies the bytes of a range from one on, counted from its first, into memories, filling all.

OSError: there are not so many, or they cannot be read."""


@runtime_checkable
class File(Protocol):
    """An open file; safe to ask from several threads."""

    def part(self, begin: int, end: int) -> Copy:
        """Return what copies bytes [begin, end); OSError if they cannot be fetched."""
        ...


class OnDisk:
    """A file on a disk.

    It is not mapped into memory: then a disk that fails would not be an error, but the end of the
    process.
    """

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._number)
        self.size = os.fstat(self._number).st_size

    def part(self, begin: int, end: int) -> Copy:
        """Return what reads bytes [begin, end)."""

        def copy(at: int, memories: Sequence[memoryview]) -> None:
            wanted, at = sum(map(len, memories)), begin + at
            count = os.preadv(self._number, memories, at)
            while count < wanted:  # a read may stop early
                rest = _after(memories, count)
                more = os.preadv(self._number, rest, at + count)
                if not more:
                    raise OSError(f"it ends at byte {at + count}")
                count += more

        return copy


def _after(memories: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of memories after their first `count` bytes."""
    rest = []
    for memory in memories:
        rest.append(memory[count:])
        count = max(0, count - len(memory))
    return [memory for memory in rest if len(memory)]


@dataclass(kw_only=True)
class Remote:
    """A file behind a URL.

    sha256: of all of it, as its set claims; with the place it names what is kept. attempts: at each
    range, with pauses that double, before its error is raised. Then no range is asked for until a
    while later: see `kept.HELD`.
    """

    place: Place
    sha256: str
    cache: Cache | None
    attempts: int
    _failed: Failed | None = None

    def part(self, begin: int, end: int) -> Copy:
        """Fetch bytes [begin, end), and return what copies them."""
        fetched = np.frombuffer(self._kept(begin, end), np.uint8)

        def copy(at: int, memories: Sequence[memoryview]) -> None:
            for memory in memories:
                np.copyto(np.frombuffer(memory, np.uint8), fetched[at : at + len(memory)])
                at += len(memory)

        return copy

    def whole(self) -> bytes:
        """Return all of a small file; only what has its SHA-256 is kept."""
        found = self.cache.get(self._name) if self.cache else None
        if found is None or not self._right(found):
            found = persistently(self.place.read, self.place, self.attempts)
            if self.cache and self._right(found):
                self.cache.put(self._name, found)
        return found

    def _right(self, found: bytes) -> bool:
        return hashlib.sha256(found).hexdigest() == self.sha256

    @property
    def _name(self) -> str:
        """What its bytes are kept under: another set may lie about what its own are."""
        return f"{self.place} {self.sha256}"

    def _kept(self, begin: int, end: int) -> bytes:
        key = f"{self._name} {begin} {end}"
        found = self.cache.get(key) if self.cache else None
        if found is None:
            found = self._fetched(begin, end)
            if self.cache:
                self.cache.put(key, found)
        return found

    def _fetched(self, begin: int, end: int) -> bytes:
        failed = self._failed
        if failed:
            failed.check()
        try:
            return persistently(lambda: self._fetch(begin, end), self.place, self.attempts)
        except Short:  # the others may be there
            raise
        except OSError as error:
            self._failed = Failed(error)
            raise

    def _fetch(self, begin: int, end: int) -> bytes:
        found = self.place.part(begin, end)
        if len(found) < end - begin:
            raise Short(f"{len(found)} bytes came of {end - begin}")
        if len(found) > end - begin:
            raise NoRanges(
                f"{len(found)} bytes came where {end - begin} were asked for: the server has to "
                "answer range requests"
            )
        return found


class NoRanges(ValueError):
    """A server that sends more than the range that was asked for; it will the next time too."""


class Short(OSError):
    """A range of a file that does not have all of it."""


def persistently(read: Callable[[], bytes], place: Place, attempts: int) -> bytes:
    """Read; on an error that may pass, again after a pause, until there is no time for it."""
    deadline = time.monotonic() + LONGEST
    for attempt in range(attempts):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError as error:
            pause = FIRST_PAUSE * 2**attempt
            if attempt == attempts - 1 or time.monotonic() + pause > deadline:
                raise
            log.warning("%s: %s; trying again in %.1f s", place, cause(error), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
