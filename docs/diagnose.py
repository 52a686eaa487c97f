"""Draw the health of runs side by side: python -m docs.diagnose RUN [RUN ...] --out PICTURE."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.plot import save
from twinflow_train.errors import UserError
from twinflow_train.metrics import FILE

PANELS: Mapping[str, tuple[str, ...]] = {
    "loss by role": ("loss/generator", "loss/local", "loss/jump", "loss/fake", "loss/rectify"),
    "delta_v, before and after its clamp": ("delta_v/before", "delta_v/after"),
    "cosine of real and fake velocity": ("delta_v/cosine",),
    "share of clamped residuals": ("residual/clamped",),
    "gradient norm, whole and by term": ("norm/grad", "norm/base", "norm/fake", "norm/rectify"),
    "teacher distance, two-step gap": ("health/teacher_distance", "health/two_step_gap"),
    "noise floor of the residual": ("health/noise_floor",),
}
LINEAR = ("cosine of real and fake velocity", "share of clamped residuals")
Curve = list[tuple[int, float]]


def curves(run: Path) -> dict[str, Curve]:
    """Read every metric of a run as (step, value); UserError if it is no run folder."""
    path = run / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a run")
    found: dict[str, Curve] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for key, value in line.items():
            number = math.nan if value is None else float(value)
            found.setdefault(key, []).append((int(line["step"]), number))
    return found


def smooth(curve: Curve) -> Curve:
    """Average over a fortieth of the curve: single steps say little."""
    width = max(1, len(curve) // 40)
    chunks = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(chunk[0][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def panel(axes: Axes, found: Mapping[str, Curve], names: Sequence[str], *, log: bool) -> None:
    """Draw some metrics of one run."""
    for name in names:
        if name in found:
            axes.plot(*zip(*smooth(found[name]), strict=True), label=name.partition("/")[2])
    if log:
        axes.set_yscale("log")
    if len(axes.lines) > 1:
        axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)


def draw(runs: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw a column for each run and a row for each panel, a row on one scale."""
    figure = Figure(figsize=(3.0 * len(runs) + 0.6, 1.75 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), len(runs), sharey="row", squeeze=False)
    for row, (title, names) in enumerate(PANELS.items()):
        for column, (run, found) in enumerate(runs.items()):
            panel(grid[row, column], found, names, log=title not in LINEAR)
            head = f"{run}\n" if row == 0 else ""
            grid[row, column].set_title(head, fontsize=11, weight="bold")
            grid[row, 0].set_ylabel(title.replace(", ", ",\n"), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the runs and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        draw({run.name: curves(run) for run in options.run}, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
