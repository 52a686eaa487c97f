"""Numbers and times of work that a device is still doing: to be read when they are there."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Later:
    """Numbers on their way from the device.

    Reading them waits for them, and not for what the device was given to do after them.
    """

    def __init__(self, *tensors: Tensor) -> None:
        flat = torch.cat([each.detach().flatten().double() for each in tensors])
        self._there: torch.cuda.Event | None = None
        self._numbers = flat
        if flat.is_cuda:
            self._numbers = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._numbers.copy_(flat, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        """Wait for the numbers, and return those of all tensors in one list."""
        if self._there is not None:
            self._there.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


class Lap:
    """The time that a device takes for what it is given from now until `end`."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None
        self._times: list[float] = []
        self._mark()

    def end(self) -> None:
        """End it, as soon as the device has done what it was given."""
        self._mark()

    def seconds(self) -> float:
        """Return its length; only when the device is known to have come to its end."""
        if self._events is None:
            return self._times[-1] - self._times[0]
        return float(self._events[0].elapsed_time(self._events[-1])) / 1000

    def _mark(self) -> None:
        self._times.append(time.perf_counter())
        if self._events is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
