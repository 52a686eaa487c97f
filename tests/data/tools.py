"""Small sets of shards, written by the real writer."""

from __future__ import annotations

from pathlib import Path

import torch

from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.rng import generator

ABOUT = About(encoder="none", revision="0", null_prompt="Generate.", licence="free")


def make_sample(index: int) -> Sample:
    """Make a sample whose latent is its index and whose two captions differ in length."""
    numbers = generator("sample", index)
    return Sample(
        key=f"s{index:03d}",
        latent=torch.full((1, 4, 4), float(index)),
        texts=tuple(torch.randn(n, 6, generator=numbers).bfloat16() for n in (2 + index % 3, 6)),
        captions=(f"short {index}", f"long {index}"),
        fields={"label": index % 10},
    )


def make_set(folder: Path, samples: int = 10, *, samples_per_shard: int = 4) -> ShardSet:
    """Write samples 0, 1, ... as a set; the null prompt has three tokens of ones."""
    return write_shards(
        folder,
        (make_sample(i) for i in range(samples)),
        null=torch.ones(3, 6),
        about=ABOUT,
        samples_per_shard=samples_per_shard,
    )
