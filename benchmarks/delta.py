"""How large may the recursion's step be, and how small under bfloat16? Short runs on the digits.

Every run starts from the export of digits_flow. What has been trained is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation import EXPERIMENT, KEPT, machine, train, write
from twinflow_train.errors import UserError
from twinflow_train.metrics import FILE
from twinflow_train.reporting.summary import read
from twinflow_train.runfolder import read_manifest

DELTAS = ("0.01", "0.03", "0.1")
PRECISIONS = ("fp32", "bf16")
ONE_STEP = "evals.samplers=[{steps: 1}]"
LAST = 50
"""Steps at the end over which the share of clamped residuals is averaged."""


def settings(delta: str, precision: str, steps: int, images: int) -> list[str]:
    """Return the words of one run's command line."""
    return [
        EXPERIMENT,
        f"objective.delta={delta}",
        f"engine.precision={precision}",
        f"steps={steps}",
        f"evals.images={images}",
        ONE_STEP,
        *("evals.base=[]", "eval_every=50", "terms_every=25", "save_every=0", "tracking=none"),
        f"name={precision}-{delta}",
    ]


def measured(words: list[str], folder: Path, delta: str, precision: str) -> dict[str, Any]:
    """Return the row of one run: kept from before, or trained now."""
    if (folder / KEPT).is_file():
        kept: dict[str, Any] = json.loads((folder / KEPT).read_text())
        if kept["words"] != words:
            raise UserError(f"{folder} was made with other settings: choose another --folder")
        return kept
    seconds = train(words, folder)
    commit = read_manifest(folder)["commit"]
    found = {"words": words, "cpu_seconds": seconds, "commit": commit}
    found |= row(folder, delta, precision)
    write(folder / KEPT, found)
    return found


def row(folder: Path, delta: str, precision: str) -> dict[str, Any]:
    """Read what a finished run says of its noise, its clamp and its one-step samples."""
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    clamped = [line["residual/clamped"] for line in lines if "residual/clamped" in line]
    floors = [line["health/noise_floor"] for line in lines if "health/noise_floor" in line]
    (ema,) = (found for found in read(folder)["results"] if found["model"] == "ema")
    return {
        "delta": delta,
        "precision": precision,
        "noise_floor": floors[-1],
        "clamped": statistics.mean(clamped[-LAST:]),
        **{key: ema[key] for key in ("accuracy", "frechet", "diversity")},
    }


def table(results: dict[str, Any]) -> str:
    """Lay the results out in Markdown."""
    lines = [
        "| precision | delta | noise floor | clamped | accuracy | Frechet | diversity |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {found['precision']} | {found['delta']} | {found['noise_floor']:.2g} | "
        f"{found['clamped']:.3f} | {found['accuracy']:.3f} | {found['frechet']:.2f} | "
        f"{found['diversity']:.2f} |"
        for found in results["runs"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200, help="of each run (%(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="judged (%(default)s)")
    parser.add_argument("--delta", action="append", help="only these")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only these")
    parser.add_argument("--folder", type=Path, default=Path("outputs/delta"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/delta.json"))
    parser.add_argument("words", nargs="*", help="key=value for every run")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    try:
        for precision in options.precision or PRECISIONS:
            for delta in options.delta or DELTAS:
                folder = options.folder / f"{precision}-{delta}"
                words = settings(delta, precision, options.steps, options.images)
                rows.append(measured([*words, *options.words], folder, delta, precision))
                write(options.out, {**machine(), "steps": options.steps, "runs": rows})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(json.loads(options.out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
