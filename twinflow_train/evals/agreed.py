"""Failures that all ranks learn of, so that none waits for another in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from twinflow_train.dist import World
from twinflow_train.errors import UserError

Made = TypeVar("Made")


class EvaluationError(UserError):
    """An evaluation cannot go on, on any rank; training can."""


def agreed(world: World, make: Callable[[], Made]) -> Made:
    """Do what takes no collective; if it fails on one rank, all raise an EvaluationError."""
    made: list[Made] = []
    said, cause = "another rank failed", None
    try:
        made.append(make())
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for it
        said, cause = f"{type(error).__name__}: {error}", error
    if world.any(not made):
        raise EvaluationError(said) from cause
    return made[0]
