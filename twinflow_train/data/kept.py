"""Results that several threads want, made once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """What a function makes of numbers, kept for the `most` numbers that were asked for last.

    Threads that ask for the same number wait for the one that makes it. Errors are not kept.
    """

    def __init__(self, make: Callable[[int], T], *, most: int) -> None:
        self._make, self._most = make, most
        self._found: OrderedDict[int, T] = OrderedDict()
        self._making: dict[int, Future[T]] = {}
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
            known = self._making.get(number)
            future = self._making[number] = known or Future[T]()
        if known is None:
            try:
                future.set_result(self._make(number))
            except BaseException as error:  # noqa: BLE001 - for all who wait; it is raised below
                future.set_exception(error)
            with self._lock:
                del self._making[number]
                if not future.exception():
                    self._found[number] = future.result()
                if len(self._found) > self._most:
                    self._found.popitem(last=False)
        return future.result()
