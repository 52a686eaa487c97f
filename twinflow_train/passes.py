"""Passes without gradient: those that can share a call do, and every rank calls alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Condition, Times, Velocity


@dataclass
class Pass:
    """Rows for which F(x_t, t, r, cond) of a network is wanted; `name` is what they are for."""

    name: str
    network: Velocity
    x_t: Float[Tensor, "b *chw"]
    t: Times
    r: Times
    cond: Condition


@torch.no_grad()
def run(calls: frozenset[str], *passes: Pass, filler: Pass) -> list[Float[Tensor, "b *chw"]]:
    """Run passes that do not depend on one another, in one call for each distinct network.

    `calls` names the passes for which any rank has rows at this micro-step. A network is called
    when one of its passes is among them, on the filler's one row where this rank has none: under
    sharding every rank must call equally often. The network of the filler is ignored.
    """
    results = [p.x_t for p in passes]
    for network in dict.fromkeys(p.network for p in passes):
        ours = [i for i, p in enumerate(passes) if p.network is network and p.name in calls]
        if not ours:
            continue
        filled = [i for i in ours if len(passes[i].t)]
        rows = [passes[i] for i in filled] or [filler]
        F = network(
            torch.cat([p.x_t for p in rows]),
            torch.cat([p.t for p in rows]),
            torch.cat([p.r for p in rows]),
            Condition.cat([p.cond for p in rows]),
        )
        parts = F.split([len(p.t) for p in rows])
        for i, part in zip(filled, parts, strict=False):
            results[i] = part
    return results
