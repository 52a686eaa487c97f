"""A rank that holds the others up is named, with its host, though all take equally long."""

from __future__ import annotations

import logging
import socket

import pytest

from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.faults.pace import RECENT, Pace

SLOW, STEP, WAITS = 1, 0.5, 2.0
"""The rank whose data come late; seconds of every rank's step, and of its wait before it."""


class Lines(logging.Handler):
    """Keeps what is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def paced(world: World, slow_above: float) -> tuple[dict[str, float], list[str]]:
    """Take steps before which one rank waits for its data; return the last figures, and lines."""
    lines = Lines()
    logging.getLogger("twinflow_train.faults.pace").addHandler(lines)
    pace, figures = Pace(world, slow_above=slow_above), dict[str, float]()
    for _ in range(RECENT + 8):
        told = world.sum(pace.mine(WAITS if world.rank == SLOW else 0.0)).tolist()
        figures = pace.figures(told, seconds=STEP)
    return figures, lines.told


@pytest.mark.parametrize("slow_above", [1.5, 0.0])
def test_a_rank_whose_data_come_late_is_named_once(slow_above: float) -> None:
    found = spawn(paced, 3, slow_above)
    for figures, _ in found:
        assert figures == found[0][0], "all ranks come to the same"
        assert WAITS < figures["time/slowest"] <= WAITS + STEP
        assert figures["time/spread"] > 1.5
    wanted = f"rank {SLOW} on {socket.gethostname()} is slow: "
    lines = [told for _, told in found]
    assert [len(each) for each in lines] == [1 if slow_above else 0, 0, 0]
    assert all(line.startswith(wanted) for line in lines[0])
