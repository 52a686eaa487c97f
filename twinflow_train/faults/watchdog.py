"""A thread that ends this process when a step does not come to its end."""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

from twinflow_train.dist import World, collectives

HUNG = 76
"""Exit code of a process that was ended because its step did not end: start the run again."""
FIRST = 5
"""Steps that compile and find their memory: they may take all of the time."""
LEAST_SECONDS, TIMES = 60.0, 20.0
"""A later step may take this long, or this many times the median step, whatever is more."""
RECENT = 64
GRACE_SECONDS = 5.0
"""How long a process that gives up waits for the others to write down where they are."""


@dataclass(kw_only=True)
class _Task:
    """Something that has to come to its end. spent: seconds so far in which we were running."""

    name: str
    limit: float
    spent: float = 0.0


class Watchdog:
    """Ends this process when a step, or waiting for its data or the others, takes too long.

    Saving, evaluating and loading take the time they take, and are not watched: their collectives
    have a limit of their own (see `dist.start`). Time in which this process was stopped does not
    count, so a job that a scheduler suspended goes on.

    Before the end, the Python stacks of all threads go to `folder`/rank-N.txt, and the last
    collectives to `folder`/collectives-N.pickle, for torch's flight recorder.
    """

    def __init__(self, hang_seconds: float, *, folder: Path, world: World) -> None:
        self._longest = hang_seconds or math.inf
        self._folder, self._world = folder, world
        self._tick = min(1.0, self._longest / 20)
        self._task: _Task | None = None
        self._taken = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if math.isfinite(self._longest):
            self._thread.start()
        if self._world.device.type == "cuda":
            with suppress(OSError):  # NCCL writes there by itself, and makes no folder
                self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()

    @property
    def limit(self) -> float:
        """Seconds that a step may take: all at first, then in proportion to the usual ones."""
        if self._taken < FIRST:
            return self._longest
        return min(self._longest, max(LEAST_SECONDS, TIMES * median(self._seconds)))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Wait for something that has a patience of its own: no less than the whole time."""
        with self._during(f"waiting for {what}", self._longest):
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a step."""
        began = time.perf_counter()
        with self._during("a step", self.limit):
            yield
        self._taken += 1
        self._seconds.append(time.perf_counter() - began)

    @contextmanager
    def _during(self, name: str, limit: float) -> Iterator[None]:
        self._task = _Task(name=name, limit=limit)
        try:
            yield
        except RuntimeError as error:
            # Most often another rank died in a collective: where, stands in the stacks of all.
            self._write(f"{name} ended with {type(error).__name__}")
            raise
        finally:
            self._task = None

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._tick):
            now, task = time.monotonic(), self._task
            if task is not None:
                task.spent += min(now - last, 2 * self._tick)
                if task.spent > task.limit:
                    self._end(task)
            last = now

    def _end(self, task: _Task) -> None:
        """Say where everything stands, and end the process whatever its other threads do."""
        # If the folder hangs too, that must not keep this process.
        threading.Timer(2 * GRACE_SECONDS, os._exit, (HUNG,)).start()
        what = f"{task.name} did not end in {task.limit:.4g} seconds"
        text = f"error: rank {self._world.rank}: {what}; see {self._folder}\n"
        os.write(2, text.encode())  # past every lock that the main thread may hold
        self._write(what)
        time.sleep(min(GRACE_SECONDS, self._longest / 2))
        os._exit(HUNG)

    def _write(self, what: str) -> None:
        """Write down the stacks of all threads, and the last collectives."""
        rank = self._world.rank
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank-{rank}.txt").open("a") as file:
                file.write(f"{now} {socket.gethostname()} process {os.getpid()}: {what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            (self._folder / f"collectives-{rank}.pickle").write_bytes(collectives(self._world))
        except OSError as error:
            os.write(2, f"error: {self._folder} cannot be written: {error}\n".encode())
