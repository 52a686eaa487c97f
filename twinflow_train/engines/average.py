"""The averaged network: how its decay grows, and how its shards follow the student's."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


@cache
def _ramp(target: float) -> list[float]:
    return [0.0]


def decay_at(target: float, update: int) -> float:
    """Return the decay of update number `update` (from 1): from 0, d += (1 - d)(target - d) / 2.

    For target .99: .495, .620, .690 and so on.
    """
    ramp = _ramp(target)
    while len(ramp) <= update:
        d = ramp[-1]
        ramp.append(d + (1 - d) * (target - d) / 2)
    return ramp[update]


@torch.no_grad()
def follow(average: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    """Move averaged shards towards the student's: T = decay T + (1 - decay) theta, in place."""
    torch._foreach_lerp_(list(average), list(student), 1 - decay)
