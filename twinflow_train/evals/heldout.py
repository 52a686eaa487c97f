"""A loss on held-out data at fixed times and fixed noise: cheap, and comparable between runs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Velocity
from twinflow_train.data.sample import condition_of
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.evals.deal import Deal
from twinflow_train.flow.path import interpolate
from twinflow_train.rng import generator

PAIRS = ((0.25, 0.25), (1.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.75, 0.75), (1.0, 0.0))
"""Times (t, r), dealt to samples in turn: the diagonal and, equally often, the far jump."""


def heldout_loss(
    velocity: Velocity, heldout: ShardSet, world: World, *, samples: int, batch: int, seed: int
) -> dict[str, float]:
    """Return the mean square of F(x_t, t, r) - (noise - data) on the diagonal and on the far jump.

    Sample i is held-out row i modulo their number, with a pair of times fixed by i and noise keyed
    by (seed, i), so the loss depends neither on ranks nor on `batch`, the rows of one call on one
    rank. The jump's loss does not go to 0: even a perfect generator does not know which data the
    noise was paired with. Collective. Names: `heldout/diagonal`, `heldout/jump`; a name that no
    sample was dealt to is left out, and so are all where held-out samples are prompts alone.
    """
    if not heldout.manifest.form.has_latents:
        return {}
    deal = Deal(count=samples, world=world)
    parts = [_losses(velocity, heldout, world, rows, seed=seed) for rows in deal.chunks(batch)]
    losses = deal.collect(torch.cat(parts)).double().cpu()
    t, r = _times(list(range(samples)))
    chosen = {"heldout/diagonal": t == r, "heldout/jump": t != r}
    return {name: float(losses[rows].mean()) for name, rows in chosen.items() if bool(rows.any())}


def _losses(
    velocity: Velocity, heldout: ShardSet, world: World, rows: list[int], *, seed: int
) -> Float[Tensor, " b"]:
    """Return each row's mean square, in float32 on the world's device."""
    found = [heldout.read(row % len(heldout)) for row in rows]
    data = torch.stack([sample.image.float() for sample in found])
    noise = torch.stack(
        [torch.randn(data.shape[1:], generator=generator("heldout", seed, row)) for row in rows]
    )
    data, noise = data.to(world.device), noise.to(world.device)
    t, r = (time.to(world.device) for time in _times(rows))
    cond = condition_of(found).to(world.device)
    with torch.no_grad():
        error = velocity(interpolate(data, noise, t), t, r, cond).float() - (noise - data)
    return error.square().flatten(1).mean(1)


def _times(rows: list[int]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Return t and r of rows; each round starts one later, for sets whose classes take turns."""
    turns = [(row + row // len(PAIRS)) % len(PAIRS) for row in rows]
    pairs = torch.tensor([PAIRS[turn] for turn in turns])
    return pairs[:, 0], pairs[:, 1]
