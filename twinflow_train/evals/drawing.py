"""Drawing held-out prompts inside a run: the same ones, and the same noise, for everybody."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Condition, Velocity
from twinflow_train.data.sample import Sample, condition_of
from twinflow_train.data.shards import ShardSet
from twinflow_train.evals.deal import Deal
from twinflow_train.flow.sampler import Sampler, sample
from twinflow_train.rng import digest, generator


@dataclass(frozen=True, kw_only=True)
class Call:
    """The inputs of the images that a rank generates together."""

    numbers: list[int]
    seed: int
    noise: Float[Tensor, "b c h w"]
    cond: Condition

    def eps(self, step: int) -> Float[Tensor, "b c h w"]:
        """Draw the fresh noise of a stochastic step."""
        shape = tuple(self.noise.shape[1:])
        return _noise("eval-eps", self.seed, self.numbers, shape, step).to(self.noise.device)


@dataclass(kw_only=True)
class Drawing:
    """Image i takes a caption of held-out sample i, modulo their number, and noise of (seed, i).

    deal: of images to ranks. batch: images of one network call on one rank.
    """

    heldout: ShardSet
    deal: Deal
    seed: int
    batch: int

    def latents(
        self, velocity: Velocity, sampler: Sampler
    ) -> tuple[Float[Tensor, "mine c h w"], float]:
        """Generate this rank's latents, and say how many seconds each took, over all ranks."""
        parts, seconds = [], 0.0
        for call in self.calls:
            began = self._now()
            parts.append(
                sample(velocity, call.noise, call.cond, sampler, null=self.null, eps=call.eps)
            )
            seconds += self._now() - began
        mine = torch.cat(parts)
        each = torch.tensor(seconds / len(mine), device=mine.device)
        return mine, float(self.deal.world.gather(each).mean())

    def prompt(self, number: int) -> Sample:
        """Read the held-out sample of an image, with one of its captions."""
        caption = digest("eval-caption", self.seed, number)
        return self.heldout.read(number % len(self.heldout), caption=caption)

    @cached_property
    def calls(self) -> list[Call]:
        """Read this rank's prompts and draw its noise, once for all networks and samplers."""
        world, shape = self.deal.world, self.heldout.latent_shape
        return [
            Call(
                numbers=numbers,
                seed=self.seed,
                noise=_noise("eval", self.seed, numbers, shape).to(world.device),
                cond=condition_of([self.prompt(number) for number in numbers]).to(world.device),
            )
            for numbers in self.deal.chunks(self.batch)
        ]

    @cached_property
    def null(self) -> Condition:
        """The null prompt on the device."""
        return self.heldout.null.to(self.deal.world.device)

    def _now(self) -> float:
        """Read the clock once the device has done what it was given."""
        if self.deal.world.device.type != "cpu":
            torch.accelerator.synchronize(self.deal.world.device)
        return time.perf_counter()


def _noise(
    use: str, seed: int, numbers: list[int], shape: tuple[int, ...], *path: int
) -> Float[Tensor, "b c h w"]:
    """Draw each image's own noise."""
    draws = [generator(use, seed, number, *path) for number in numbers]
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws])
