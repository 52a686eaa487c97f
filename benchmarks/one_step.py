"""A picture of what runs from one base draw in a single network evaluation, on the same noise."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation import exported
from twinflow_train.batch import Condition
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError
from twinflow_train.evals.grid import Column, draw, save
from twinflow_train.flow.sampler import Sampler, Style, sample
from twinflow_train.models.base import VelocityNet
from twinflow_train.rng import generator
from twinflow_train.run import model_of

BASE = Sampler(style=Style.multi)
"""A base knows only the velocity where it stands."""

ONE_STEP = Sampler()


@dataclass(frozen=True, kw_only=True)
class Block:
    """Columns of one network: its name and how it is sampled."""

    name: str
    net: VelocityNet
    sampler: Sampler


def blocks(runs: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[Block]:
    """Open the base of the runs and each run's export; UserError if the bases differ."""
    bases = {config["init_from"] for config in runs}
    if len(bases) > 1 or None in bases:
        raise UserError(f"the runs start from {sorted(map(str, bases))}: choose runs of one base")
    (base,) = bases
    model = model_of(runs[0]["model"])
    found = [Block(name="base", net=exported(model, Path(base)), sampler=BASE)]
    for config, folder in zip(runs, folders, strict=True):
        name = str(config["name"]).rpartition("_")[2]
        net = exported(model_of(config["model"]), folder / "export")
        found.append(Block(name=name, net=net, sampler=ONE_STEP))
    return found


def configuration(folder: Path) -> dict[str, Any]:
    """Read what a run was configured with; UserError if it is no run folder."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: give folders of runs")
    found: dict[str, Any] = json.loads(path.read_text())["config"]
    return found


def prompts(heldout: ShardSet) -> list[Sample]:
    """Read the first held-out sample of each label, in the order of labels."""
    first: dict[int, Sample] = {}
    for index in range(len(heldout)):
        found = heldout.read(index, caption=0)
        first.setdefault(int(found.fields["label"]), found)
    return [first[label] for label in sorted(first)]


def columns(block: Block, rows: Sequence[Sample], *, noises: int, seed: int) -> list[Column]:
    """Draw every prompt from its own noises; column k of any network has the same noise."""
    cond = Condition.pad([row.text.float() for row in rows])
    shape = rows[0].image.shape
    found = []
    for k in range(noises):
        paths = [generator("one-step", seed, row, k) for row in range(len(rows))]
        noise = torch.stack([torch.randn(shape, generator=path) for path in paths])
        images = sample(block.net, noise, cond, block.sampler)
        heading = f"{block.name}\n{block.sampler.nfe} NFE" if k == 0 else ""
        found.append(Column(heading=heading, images=images))
    return found


def margin(like: Tensor) -> Column:
    """Return an empty column to stand between two networks."""
    return Column(heading="", images=torch.ones_like(like))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished digit runs")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--noises", type=int, default=4, help="for each prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        configs = [configuration(folder) for folder in options.runs]
        data = {key: value for key, value in configs[0]["data"].items() if key != "_type"}
        rows = prompts(ShardSet(data["heldout"], option="data.heldout"))
        shown: list[Column] = []
        for block in blocks(configs, options.runs):
            drawn = columns(block, rows, noises=options.noises, seed=options.seed)
            shown += ([margin(drawn[0].images)] if shown else []) + drawn
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save(draw(shown, prompts=[row.caption for row in rows]), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
