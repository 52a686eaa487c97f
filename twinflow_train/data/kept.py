"""Results that several threads want, made once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")

HELD = 30
"""Seconds for which what failed is not tried again: many samples of a step want the same file."""


class Kept(Generic[T]):
    """What a function makes of numbers, kept for the `most` numbers that were asked for last.

    Threads that ask for the same number wait for the one that makes it. Errors are kept for a
    while: see `HELD`.
    """

    def __init__(self, make: Callable[[int], T], *, most: int) -> None:
        self._make, self._most = make, most
        self._found: OrderedDict[int, T] = OrderedDict()
        self._making: dict[int, Future[T]] = {}
        self._failed: dict[int, Failed] = {}
        self._lock = threading.Lock()

    def __contains__(self, number: int) -> bool:
        return number in self._found or number in self._making

    def get(self, number: int) -> T:
        """Return what the function makes of a number; whatever it raises."""
        try:
            found = self._found[number]
            self._found.move_to_end(number)
        except KeyError:  # not made, or thrown away just now
            return self._made(number)
        return found

    def _made(self, number: int) -> T:
        with self._lock:
            if number in self._found:
                return self._found[number]
            if number in self._failed:
                self._failed[number].check()
            known = self._making.get(number)
            future = self._making[number] = known or Future[T]()
        if known is None:
            try:
                future.set_result(self._make(number))
            except BaseException as error:  # noqa: BLE001 - for all who wait; it is raised below
                future.set_exception(error)
            with self._lock:
                del self._making[number]
                if failed := future.exception():
                    self._failed[number] = Failed(failed)
                else:
                    self._failed.pop(number, None)
                    self._found[number] = future.result()
                if len(self._found) > self._most:
                    self._found.popitem(last=False)
        return future.result()


class Failed:
    """An error, and until when it stands for another attempt."""

    def __init__(self, error: BaseException) -> None:
        self._error, self._until = error, time.monotonic() + HELD

    def check(self) -> None:
        """Raise the error, unless it is time for another attempt."""
        if time.monotonic() < self._until:
            raise self._error.with_traceback(None)
