"""Small sets of shards, written by the real writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from twinflow_train.data.manifest import About, LatentShape, Manifest
from twinflow_train.data.sample import Sample, form_of
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_null, write_shard, write_shards
from twinflow_train.rng import generator

ABOUT = About(encoder="none", revision="0", null_prompt="Generate.", licence="free")
Shard = tuple[LatentShape, Sequence[int]]
"""The shape of a shard's latents, and how many tokens the text of each of its samples has."""


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


def make_shards(folder: Path, shards: Sequence[Shard], *, name: str = "s", width: int = 2) -> Path:
    """Write shards whose latents and texts are full of their samples' numbers in the set."""
    folder.mkdir(parents=True)
    written, number = [], 0
    for file, (shape, lengths) in enumerate(shards):
        samples = []
        for tokens in lengths:
            latent = torch.full(shape, float(number)).bfloat16()
            text = torch.full((tokens, width), float(number)).bfloat16()
            key = f"{name}-{number:05d}"
            samples.append(Sample(key=key, latent=latent, texts=[text], captions=["?"]))
            number += 1
        form = form_of(samples[0])
        path = folder / f"{file:06d}.tar"
        written.append(write_shard(path, samples, form, latent_shape=shape))
    null = write_null(folder, torch.ones(1, width).bfloat16())
    Manifest(about=ABOUT, form=form, null_sha256=null, shards=tuple(written)).write(folder)
    return folder
