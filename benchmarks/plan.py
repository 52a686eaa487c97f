"""What a plan says that a step takes of memory, against what the allocator hands out for it.

`OMP_NUM_THREADS=1 python -m benchmarks.plan` takes steps of small Qwen-Images on CPUs, on one rank
and on two that talk by gloo.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation import machine
from tests.helpers import spawn
from tests.planner.test_memory import job, several
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.planner.memory import Job, memory

RESULTS = Path(__file__).parent / "results" / "plan.json"
RANKS, WIDTHS, LAYERS, RECOMPUTE = (1, 2), (128, 192), (2, 4), (1, 0)
SIDE, EACH = 16, 4
"""Latents along a side, and samples of a rank, which are one micro-batch."""
HEAD = 32
COLUMNS = ("ranks", "width", "layers", "recompute", "planned_mib", "measured_mib", "ratio")


def jobs(ranks: int) -> dict[tuple[int, int, int], Job]:
    """Give the ladder by width, layers and recomputation."""
    return {
        (width, layers, again): job(
            layers=layers,
            heads=width // HEAD,
            ranks=ranks,
            engine=FSDP2(recompute=again),
            batch=EACH * ranks,
            micro_batch=EACH,
            latent=(SIDE, SIDE),
        )
        for width in WIDTHS
        for layers in LAYERS
        for again in RECOMPUTE
    }


def measure() -> list[dict[str, Any]]:
    """Plan and measure each; of the ranks the one that took most."""
    rows = []
    for ranks in RANKS:
        wanted = jobs(ranks)
        found = spawn(several, ranks, wanted, timeout_seconds=900)
        for key, one in wanted.items():
            planned, taken = memory(one).peak, max(rank[key] for rank in found)
            values = (ranks, *key, planned / 2**20, taken / 2**20, planned / taken)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out in Markdown."""
    lines = [
        "| ranks | width | blocks | recompute | planned, MiB | measured, MiB | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        whole = [str(row[name]) for name in COLUMNS[:4]]
        sizes = [f"{row[name]:.1f}" for name in COLUMNS[4:6]]
        lines.append(f"| {' | '.join([*whole, *sizes])} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    given = parser.parse_args(arguments)
    rows = measure()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"about": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
