"""A run small enough for tests: real digits, a one-block network, and a base to start from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evals.digits import PHRASES, WORDS, images
from tests.program import Program, serve
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.writing import write_shards
from twinflow_train.evals.judge import fit_judge
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.weights import save_folder
from twinflow_train.rng import generator

WIDTH = 8
STEPS = 12
SIZE: Any = {"layers": 1, "heads": 2, "head_dim": 8, "channels": 1, "patch": 7}
ROPE = [2, 2, 4]
JUDGE = "judge.safetensors"
ABOUT = About(encoder="random", revision="1", null_prompt="", licence="test")


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Where the shards, the judge and the base stand, and the program that uses them."""

    folder: Path
    program: Program

    def words(self, folder: Path | str, *more: str) -> list[str]:
        """Return the command line of the tiny run; later words win."""
        return words(self.folder, folder, *more)


def words(made: Path, folder: Path | str, *more: str) -> list[str]:
    """Return the command line of a run in `folder` from what `build` made; later words win."""
    return [
        "experiment=digits_twinflow",
        *(f"model.{key}={value}" for key, value in SIZE.items()),
        f"model.rope={ROPE}",
        f"model.text_width={WIDTH}",
        f"init_from={made / 'base'}",
        f"data.path={made / 'train'}",
        f"data.heldout={made / 'heldout'}",
        f"evals.judge={made / JUDGE}",
        "evals.images=12",
        "evals.samplers=[{steps: 1}, {steps: 2, stochasticity: 1.0}]",
        "evals.base=[{steps: 2, style: multi, guidance: 2.0}]",
        *(f"steps={STEPS}", "batch=8", "micro_batch=4", "save_every=4", "eval_every=4"),
        *("tracking=none", f"folder={folder}"),
        *more,
    ]


def tiny(factory: pytest.TempPathFactory) -> Tiny:
    """Build everything, once a session, and start the server."""
    return _tiny(factory.getbasetemp() / "tiny")


@cache
def _tiny(folder: Path) -> Tiny:
    folder.mkdir()
    (folder / "processes").mkdir()
    program = serve(scratch=folder / "processes", cwd=folder)  # starts while we build
    build(folder)
    return Tiny(folder=folder, program=program)


def build(folder: Path) -> None:
    """Write the shards, the judge and the base."""
    train, heldout = write(folder / "train", range(0, 5000, 50)), range(1, 5000, 125)
    fit_judge(train=train, heldout=write(folder / "heldout", heldout), path=folder / JUDGE)
    write_base(folder / "base", QwenImage(**SIZE, rope=ROPE, text_width=WIDTH))


def write(folder: Path, rows: range, *, note: str = "") -> Any:
    """Write digits as shards, each caption with random embeddings of its own."""
    pixels, labels = images()
    samples = []
    for row in rows:
        captions = [phrase.format(WORDS[int(labels[row])]) + note for phrase in PHRASES]
        samples.append(
            Sample(
                key=f"digit-{row:04d}",
                latent=pixels[row],
                texts=[_text(caption, 2 + n) for n, caption in enumerate(captions)],
                captions=captions,
                fields={"label": int(labels[row])},
            )
        )
    null = _text("", 1)
    return write_shards(folder, samples, null=null, about=ABOUT, samples_per_shard=25)


def _text(caption: str, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=generator("tiny-text", caption))


def write_base(folder: Path, model: QwenImage) -> None:
    """Write weights without a second time embedder; all are random, so that all matter."""
    net = model.build()
    tensors = (
        (name, torch.randn(net.get_parameter(own).shape, generator=generator("tiny", name)) / 8)
        for own, name in net.stored_names().items()
        if not name.startswith("time_text_embed_2.")
    )
    save_folder(folder / "transformer", model.config(), tensors)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` without what depends on the clock and the machine."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "memory/", "speed/")) and "seconds" not in key
        }
        for line in lines(folder)
    ]


def steps(folder: Path) -> list[int]:
    """List the steps that have a loss, in the order of the file."""
    return [line["step"] for line in lines(folder) if "loss/total" in line]


def checkpoints(folder: Path) -> list[str]:
    """List what stands among the checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
