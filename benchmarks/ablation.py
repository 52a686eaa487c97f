"""What each part of TwinFlow is worth on the built-in digits, at equal network passes.

Every variant starts from the export of digits_flow and is trained by the real program, a process a
run. What has been trained and scored is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import hydra
import torch

from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.launch import compose
from twinflow_train.metrics import FILE
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.planner import cost
from twinflow_train.reporting.summary import read
from twinflow_train.run import Run, register
from twinflow_train.runfolder import read_manifest

TOP = Path(__file__).parent.parent
EXPERIMENT = "experiment=digits_twinflow"
L2 = ("objective.distance.alpha=2", "objective.distance.c=1")
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no L_adv": ("objective.shares.fake=0",),
    "no L_rectify": ("objective.rectify_weight=0",),
    "rcgm": ("objective=rcgm",),
    "twinflow_paper": ("objective=twinflow_paper",),
    "l2": L2,
    "delta .1": ("objective.delta=0.1",),
}
"""What is compared, as words after EXPERIMENT; `full` sets the budget of all."""

SCORES = {"accuracy": ("Prompt accuracy", 3), "frechet": ("Frechet distance", 2),
          "diversity": ("Diversity", 2)}  # fmt: skip
WITH_GRADIENT = 3  # forward passes that a forward and backward pass of a sample costs
KEPT = "scores.json"
MARKS = "<!-- tables of the ablation: begin -->", "<!-- tables of the ablation: end -->"
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}
"""The Makefile's, on one thread; what is set outside wins."""


def composed(*words: str) -> Run:
    """Compose in this process what a command line gives the program."""
    register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(TOP / "conf")):
        return compose(hydra.compose("train", overrides=list(words)))


def passes(run: Run, step: int) -> int:
    """Count the network passes of a step: forward passes of one sample, or what costs as much."""
    spent = cost(run.objective, run.deal(ALONE), seed=0, step=step)
    return WITH_GRADIENT * run.batch + spent.passes


def nearest(spent: Iterable[int], budget: int) -> tuple[int, int]:
    """Return how many of the first steps together spend what is nearest to `budget`, and that.

    At least one; of two that are equally near the smaller number.
    """
    total = 0
    for step, each in enumerate(spent):
        if step and total + each - budget >= budget - total:
            return step, total
        total += each
        if total >= budget:
            break
    return step + 1, total


def plan(names: Sequence[str], words: Sequence[str], steps: int) -> dict[str, tuple[int, int]]:
    """Give each variant the steps, and their passes, that cost what `steps` of `full` cost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the program itself warns of a variant without fake rows
        runs = {name: composed(EXPERIMENT, *VARIANTS[name], *words) for name in ("full", *names)}
    budget = sum(passes(runs["full"], step) for step in range(steps))
    return {name: nearest((passes(runs[name], k) for k in count()), budget) for name in names}


def exported(model: Model, folder: Path) -> VelocityNet:
    """Load the weights in a run's export, or in any diffusers folder, for sampling on the CPU."""
    weights, net = model.stored_weights(folder), model.build().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            shape = parameter.shape
            rows = shape[0] if len(shape) else 1
            parameter.copy_(weights.read(net.stored_name(name), shape, 0, rows))
    return net.requires_grad_(False)


def train(words: Sequence[str], folder: Path) -> float | None:
    """Train one run with the real program and return its CPU-seconds; UserError if it fails.

    None where the run was begun before: what that cost is not known.
    """
    begun = (folder / FILE).is_file()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "twinflow_train.train", *words, f"folder={folder}"]
    ended = subprocess.run(command, env=ENVIRONMENT | os.environ, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise UserError(f"{folder}: the run ended with exit code {ended.returncode}; see above")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return None if begun else round(seconds, 1)


def scored(name: str, *, seed: int, steps: int, words: Sequence[str], folder: Path) -> Any:
    """Return the row of one variant and seed: kept from before, or trained and scored now."""
    run = composed(EXPERIMENT, *VARIANTS[name], *words)
    asked = {"variant": name, "seed": seed, "steps": steps, "words": list(words)}
    if (folder / KEPT).is_file():
        row = json.loads((folder / KEPT).read_text())
        if asked != {key: row[key] for key in asked}:
            raise UserError(f"{folder} was made with other settings: choose another --folder")
        return row
    for_training = [word for word in words if not word.startswith("evals.")]
    fixed = ("evals=none", "eval_every=0", "save_every=0", "tracking=none")
    named = (f"name={folder.name}", f"seed={seed}", f"steps={steps}")
    seconds = train([EXPERIMENT, *VARIANTS[name], *for_training, *fixed, *named], folder)
    if (done := read(folder)["step"]) != steps:
        raise UserError(f"{folder} has {done} steps, not {steps}: choose another --folder")
    networks = {"ema": exported(run.model, folder / "export")}
    found = run.evals.evaluate(networks, run.evals.samplers, run.data.held_out(), ALONE)
    row = asked | {"cpu_seconds": seconds, "commit": read_manifest(folder)["commit"]}
    row |= found.summary()
    write(folder / KEPT, row)
    return row


def write(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)


def machine() -> dict[str, Any]:
    """Say when and on what this runs."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def tables(results: dict[str, Any]) -> str:
    """Lay the results out in Markdown: what was run, then a table for each score."""
    by_name: dict[str, list[Any]] = {}
    for row in results["runs"]:
        by_name.setdefault(row["variant"], []).append(row)
    samplers = [_sampler(result) for result in results["runs"][0]["results"]]
    lines = ["| variant | words | steps | network passes | CPU-seconds | seeds |",
             "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, rows in by_name.items():
        words = " ".join(f"`{word}`" for word in VARIANTS[name])
        known = [row["cpu_seconds"] for row in rows if row["cpu_seconds"] is not None]
        seconds = f"{statistics.mean(known):.0f}" if known else ""
        lines.append(
            f"| {name} | {words} | {rows[0]['steps']} | {results['passes'][name]:,} | "
            f"{seconds} | {len(rows)} |"
        )
    for score, (title, digits) in SCORES.items():
        lines += ["", f"| {title} | {' | '.join(samplers)} |", "|---|" + "---:|" * len(samplers)]
        for name, rows in by_name.items():
            each = [[row["results"][k][score] for row in rows] for k in range(len(samplers))]
            cells = " | ".join(spread(values, digits) for values in each)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Write the mean and, of several values, the least and the greatest; null is nan."""
    numbers = [math.nan if value is None else value for value in values]
    least, greatest = min(numbers), max(numbers)
    mean, *ends = (
        f"{value:.{digits}f}".removeprefix("0" if abs(value) < 1 else "")
        for value in (statistics.mean(numbers), least, greatest)
    )
    return mean if len(numbers) == 1 else f"{mean} ({' to '.join(ends)})"


def _sampler(result: dict[str, Any]) -> str:
    """Head a column: evaluations, and whether fresh noise goes in between."""
    return f"{result['nfe']} NFE" + (", stochastic" if result["stochasticity"] else "")


def insert(text: str, path: Path) -> None:
    """Put text between the two marks of a document; UserError if they are not there."""
    before, begin, rest = path.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise UserError(f"{path} lacks the lines {MARKS[0]!r} and {MARKS[1]!r}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def run_all(options: argparse.Namespace) -> None:
    """Train and score every variant, one seed after the other, and write down what there is."""
    names = options.variant or list(VARIANTS)
    words = [f"evals.images={options.images}", *options.words]
    planned = plan(names, words, options.steps)
    settings = {"steps": options.steps, "images": options.images}
    results = {**machine(), **settings, "passes": {name: planned[name][1] for name in names}}
    rows: list[Any] = []
    for seed in range(options.seeds):
        for name in names:
            slug = "".join(char if char.isalnum() else "_" for char in name)
            folder = options.folder / f"{slug}-{seed}"
            steps = planned[name][0]
            rows.append(scored(name, seed=seed, steps=steps, words=words, folder=folder))
            write(options.out, results | {"runs": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, unless only the tables are asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=500, help="of `full` (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="judged (%(default)s)")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only these")
    parser.add_argument("--folder", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument("--table", action="store_true", help="train nothing, show what is in --out")
    parser.add_argument("--docs", type=Path, help="put the tables into this document, too")
    parser.add_argument("words", nargs="*", help="key=value for every run")
    options = parser.parse_args(arguments)
    try:
        if not options.table:
            run_all(options)
        if not options.out.is_file():
            raise UserError(f"{options.out} is missing: run without --table first")
        text = tables(json.loads(options.out.read_text()))
        if options.docs:
            insert(text, options.docs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
