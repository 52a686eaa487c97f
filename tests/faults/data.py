"""Data that break a step: finite in a file, and not any more once they are squared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tests.evals.digits import images
from tests.tiny import ABOUT, WIDTH
from twinflow_train.data.loader import Shards
from twinflow_train.data.sample import Sample
from twinflow_train.data.writing import write_shards
from twinflow_train.rng import generator

HUGE = 1e30
PER_SHARD = 24


def shown(folder: Path, step: int, row: int) -> int:
    """Return the number of the sample that a step of 8 shows in a row, in sets of this size."""
    data = Shards(path=str(folder), heldout=str(folder), window=1, lanes=1, by_length=False)
    stream = data.stream(seed=0, batch=8)
    return stream.rows(stream.plan(step, range(8), groups=[8]))[row].number


def poisoned(
    folder: Path, broken: Callable[[int], bool], *, samples: int = 96, factor: float = HUGE
) -> Path:
    """Write digits, of which the broken ones, by number, are so many times too bright.

    By default they are larger than float32 can square.
    """
    pixels, labels = images()
    found = []
    for n in range(samples):
        text = torch.randn(3, WIDTH, generator=generator("poisoned", n))
        found.append(
            Sample(
                key=f"digit-{n:04d}",
                latent=pixels[13 * n] * (factor if broken(n) else 1),
                texts=[text],
                captions=[f"number {n}"],
                fields={"label": int(labels[13 * n])},
            )
        )
    null = torch.zeros(1, WIDTH)
    write_shards(folder, found, null=null, about=ABOUT, samples_per_shard=PER_SHARD)
    return folder
