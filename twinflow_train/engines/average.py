"""Averaged networks: how their decay grows, and how their shards follow the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from twinflow_train.errors import check
from twinflow_train.rng import generator


@dataclass(kw_only=True)
class Averages:
    """How averaged networks are held; the decay of the teacher's is the objective's.

    slow: decay of a second average, for evaluation only; 0 is none.
    bf16: hold averages in bfloat16, rounded stochastically: half the memory, more noise.
    offload: keep the shards of averages in host memory.
    """

    slow: float = 0.0
    bf16: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        check("average", self, [("slow", 0 <= self.slow < 1, "in [0, 1)")])

    def decays(self, teacher: float) -> dict[str, float]:
        """Name the networks beside the student and their decays; one that is frozen has 1."""
        wanted = {"frozen" if teacher == 1 else "average": teacher, "slow": self.slow}
        return {kind: decay for kind, decay in wanted.items() if decay > 0}


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


class Ramp:
    """The growing decay of an average, on the device: how far it has come is known there alone."""

    def __init__(self, target: float, device: torch.device) -> None:
        self._target = target
        self._decay = torch.zeros((), dtype=torch.float64, device=device)

    def restore(self, updates: int) -> None:
        """Be where so many updates lead."""
        self._decay.fill_(decay_at(self._target, updates))

    def advance(self, updated: Tensor) -> Tensor:
        """Count an update if there was one; return its decay, else 1."""
        d = self._decay
        grown = d + (1 - d) * (self._target - d) / 2
        self._decay = torch.where(updated, grown, d)
        return torch.where(updated, grown, 1.0)


@torch.no_grad()
def follow(
    average: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    path: Sequence[object],
) -> None:
    """Move averaged shards towards the student's: T = decay T + (1 - decay) theta, in place.

    They may lie on another device or be bfloat16, which is then rounded up or down at random with
    the mean kept: rounding to the nearest would stop an average of decay .99 from moving at all.
    `path` names this update on this rank, for the draws.
    """
    alike = all(
        a.dtype == s.dtype and a.device == s.device for a, s in zip(average, student, strict=True)
    )
    if alike and not isinstance(decay, Tensor):
        torch._foreach_lerp_(list(average), list(student), 1 - decay)
        return
    shares: dict[torch.device, Tensor] = {}
    for i, (ours, theirs) in enumerate(zip(average, student, strict=True)):
        if ours.device not in shares:
            shares[ours.device] = torch.as_tensor(1 - decay).to(ours.device, torch.float32)
        share = shares[ours.device]
        if alike and ours.dtype == share.dtype:
            ours.lerp_(theirs, share)
            continue
        moved = ours.float().lerp_(theirs.to(ours.device, torch.float32), share)
        if ours.dtype == torch.bfloat16:
            round_randomly(ours, moved, generator("round", *path, i, device=ours.device))
        else:
            ours.copy_(moved)


def round_randomly(out: Tensor, values: Tensor, draws: torch.Generator) -> None:
    """Write float32 values to a bfloat16 tensor, up or down at random with the mean kept."""
    noise = torch.randint(
        0, 1 << 16, values.shape, generator=draws, dtype=torch.int32, device=values.device
    )
    out.copy_(((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))
