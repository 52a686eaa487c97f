"""How a step's cost grows with the batch, the resolution and the ranks, on CPUs.

`OMP_NUM_THREADS=1 python -m benchmarks.growth` takes TwinFlow steps of a tiny Qwen-Image under
FSDP2 and counts the CPU-seconds of a rank for each sample of its own: with ranks that share few
cores wall time would say how many cores there are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import growth
from benchmarks.ablation import machine
from benchmarks.step import model, ours
from docs.plot import save
from tests.helpers import spawn
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.models.adapter import NoAdapter
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner import rows_by_pass
from twinflow_train.planner.flops import work

RESULTS = Path(__file__).parent / "results" / "growth.json"
PICTURE = Path(__file__).parent.parent / "docs" / "growth.png"
BATCHES, SIDES, RANKS = (4, 8, 16, 32), (16, 32, 48, 64), (1, 2, 4)
NAMES = ("batch", "tokens", "ranks")
EACH, SIDE, TEXT, ROWS = 4, 32, 32, 4
"""Samples of a rank, latents along a side, text tokens, and rows of a micro-batch, where they are
not what grows."""


def seconds(world: World, width: int, batch: int, side: int, rounds: int) -> float:
    """Return the least CPU-seconds of this rank in a step of `batch` samples over all ranks."""
    step = ours(model(width), TwinFlow(), [TEXT] * batch, side, world, ROWS)
    found = []
    for number in range(rounds + 1):
        began = time.process_time()
        step(number)
        found.append(time.process_time() - began)
    return min(found[1:])


def measure(width: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Let one thing grow at a time; give a rank's seconds and operations by its own samples."""
    (one,) = NoAdapter().assemble(model(width), [])
    counted = work(model(width), one.net)

    def row(name: str, value: int, batch: int, side: int, ranks: int = 1) -> dict[str, Any]:
        # By its module's name: processes do not know this program's own.
        spent = max(spawn(growth.seconds, ranks, width, batch, side, rounds, timeout_seconds=900))
        image, mine = (side // model(width).patch) ** 2, batch // ranks
        dealt = Deal(batch=batch, micro_batch=ROWS, ranks=ranks, rank=0)
        rows = rows_by_pass(TwinFlow(), dealt, seed=0)
        wanted = sum(counted.step(rows, image, TEXT).values())
        return {name: value, "seconds": spent / mine, "gflop": wanted / mine / 1e9}

    return {
        "batch": [row("batch", batch, batch, SIDE) for batch in BATCHES],
        "tokens": [row("tokens", (side // model(width).patch) ** 2, EACH, side) for side in SIDES],
        "ranks": [row("ranks", ranks, EACH * ranks, SIDE, ranks) for ranks in RANKS],
    }


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw seconds a sample, and what they would be if they grew with the operations alone."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), NAMES, strict=True):
        rows = found[name]
        at: list[int] = [row[name] for row in rows]
        first = rows[0]["seconds"] / rows[0]["gflop"]
        axes.plot(at, [row["seconds"] for row in rows], "o-", label="measured")
        axes.plot(at, [row["gflop"] * first for row in rows], "--", label="as its operations")
        axes.set_xlabel(name if name != "tokens" else "image tokens")
        axes.set_ylabel("CPU-seconds of a rank a sample")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xticks(at)
        axes.legend()
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="(%(default)s)")
    given = parser.parse_args(arguments)
    grown = measure(given.width, given.rounds)
    found = {"about": machine() | {"width": given.width}, **grown}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    draw(grown, given.picture)
    for name in NAMES:
        print(f"\n| {name} | CPU-seconds a sample | GFLOP a sample |\n|---:|---:|---:|")
        for row in grown[name]:
            print(f"| {row[name]} | {row['seconds']:.3f} | {row['gflop']:.1f} |")


if __name__ == "__main__":
    main()
