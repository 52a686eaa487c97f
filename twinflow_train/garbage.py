"""Python's garbage collector, which otherwise stops each process at moments of its own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50
"""Steps between collections: all ranks make theirs at the same one, and so wait but once."""


class Collector:
    """Collects at given steps."""

    def at(self, step: int) -> None:
        """Collect what the last steps left, if it is time."""
        if step % EVERY == 0:
            gc.collect(1)


@contextmanager
def collecting() -> Iterator[Collector]:
    """Collect only when told to; what there is already is not looked at again."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield Collector()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
