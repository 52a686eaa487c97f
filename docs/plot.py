"""The figures of method.md, from points that toy.py computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

DATA, REAL, FAKE, ONE = "#8a8a8a", "#1f6fb4", "#d9600a", "#1a8a3c"
"""Colours of data, the real side, the fake side, and samples of the generator."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of time 0: its flow from noise to data, and what x_t looks like on the way.

    times: from 1 to 0. flow: (times, samples, 2), integrated. seen: clouds of x_t by |t|.
    """

    times: Sequence[float]
    flow: Tensor
    seen: Mapping[float, Tensor]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One-step samples at some time of training, and the mean delta_v of the first of them."""

    title: str
    samples: Tensor
    arrows: Tensor


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Samples, their distance from the data, and the share of them that is astray."""

    title: str
    points: Tensor
    distance: float
    astray: float


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours: a plot needs no more, and the file is a third as large."""
    whole = BytesIO()
    figure.savefig(whole, format="png", dpi=110, facecolor="white")
    picture = Image.open(whole).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def cloud(
    axes: Axes,
    points: Tensor,
    color: str,
    *,
    size: float = 1.6,
    alpha: float = 0.4,
    reach: float = 2.3,
) -> None:
    """Scatter points in a square panel of the plane, from -reach to reach, without ticks."""
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
    x, y = points.T.tolist()
    axes.scatter(x, y, s=size, c=color, alpha=alpha, linewidths=0)


def two_sides(path: Path, real: Side, fake: Side, jumps: tuple[Tensor, Tensor]) -> None:
    """Draw the axis of signed time: flows of both scores, the generator's jumps, clouds of x_t."""
    figure = Figure(figsize=(11, 6.2))
    n = len(real.seen)
    grid = figure.add_gridspec(
        2, 2 * n + 1, height_ratios=[1.9, 1], width_ratios=[1] * n + [0.2] + [1] * n
    )
    grid.update(left=0.06, right=0.985, top=0.93, bottom=0.055, wspace=0.08, hspace=0.36)
    for side, sign, first in ((fake, -1, 0), (real, 1, n + 1)):
        axes = figure.add_subplot(grid[0, first : first + n])
        _flow(axes, side, sign)
        if sign > 0:
            _jumps(axes, jumps)
        clouds = sorted(side.seen.items(), key=lambda item: sign * item[0])
        for column, (t, points) in enumerate(clouds, first):
            panel = figure.add_subplot(grid[1, column])
            name, color = _what(t, sign)
            cloud(panel, points, color, size=1.2, alpha=0.35)
            panel.set_title(f"t = {'-' if sign < 0 else ''}{t:g}", fontsize=11, pad=3)
            panel.set_xlabel(name, fontsize=11, color=color)
    save(figure, path)


def _what(t: float, sign: int) -> tuple[str, str]:
    """Name the cloud at time `sign` t, and choose its colour."""
    if t == 0:
        return ("data", DATA) if sign > 0 else ("one-step samples", ONE)
    return "noise" if t == 1 else "", REAL if sign > 0 else FAKE


def _flow(axes: Axes, side: Side, sign: int) -> None:
    """Draw the first coordinate of integrated samples against signed time."""
    color = REAL if sign > 0 else FAKE
    times = [sign * t for t in side.times]
    axes.plot(times, side.flow[:, :, 0].numpy(), color=color, alpha=0.4, linewidth=0.8)
    axes.set_ylim(-2.8, 2.6)
    axes.set_xlim(*sorted((0.0, float(sign))))
    axes.set_xlabel("signed time t", fontsize=11)
    title = "real side, t > 0: flow of F(x, t, t)"
    if sign > 0:
        axes.set_yticklabels([])
    else:
        title = "fake side, t < 0: flow of F(x, -t, -t)"
        axes.set_ylabel("first coordinate of x", fontsize=11)
    axes.set_title(title, color=color, fontsize=13, weight="bold")


def _jumps(axes: Axes, jumps: tuple[Tensor, Tensor]) -> None:
    """Draw the generator's straight jumps from noise at time 1 to data at time 0."""
    arrow = {"arrowstyle": "-|>", "color": ONE, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    for start, end in zip(*(points[:, 0].tolist() for points in jumps), strict=True):
        axes.annotate("", (0, end), (1, start), arrowprops=arrow)
    text = "generator F(z, 1, 0): one straight jump"
    axes.text(0.98, -2.6, text, color=ONE, fontsize=11.5, ha="right", weight="bold")


def pull(
    path: Path,
    data: Tensor,
    moments: Mapping[str, Sequence[Moment]],
    sizes: Mapping[str, Sequence[float]],
) -> None:
    """Draw, a row a training, what delta_v does to one-step samples; beside it, its mean size."""
    columns = max(map(len, moments.values()))
    figure = Figure(figsize=(13, 5.4))
    grid = figure.add_gridspec(len(moments), columns + 2, width_ratios=[1] * columns + [0.16, 1.45])
    grid.update(left=0.022, right=0.99, top=0.94, bottom=0.13, wspace=0.05, hspace=0.05)
    for row, (name, each) in enumerate(moments.items()):
        for column, moment in enumerate(each):
            axes = figure.add_subplot(grid[row, column])
            cloud(axes, data, DATA, size=2, alpha=0.45, reach=2.75)
            cloud(axes, moment.samples, ONE, size=2.5, alpha=0.5, reach=2.75)
            _arrows(axes, moment)
            if row == 0:
                axes.set_title(moment.title, fontsize=12)
            if column == 0:
                axes.set_ylabel(name, fontsize=13)
    legend = (
        ("grey: data", DATA),
        ("green: one-step samples", ONE),
        ("arrows: mean delta_v", FAKE),
    )
    for place, (text, color) in zip((0.022, 0.16, 0.37), legend, strict=True):
        figure.text(place, 0.04, text, color=color, fontsize=12.5, weight="bold")
    axes = figure.add_subplot(grid[:, -1])
    for (name, values), color in zip(sizes.items(), (FAKE, REAL), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1.6, label=name)
    axes.set_xlabel("step of training", fontsize=11)
    axes.set_title("mean |delta_v|", fontsize=12)
    axes.set_ylim(0)
    axes.legend(fontsize=11, frameon=False)
    save(figure, path)


def _arrows(axes: Axes, moment: Moment) -> None:
    """Draw where delta_v moves the first samples."""
    x, y = moment.samples[: len(moment.arrows)].T.tolist()
    along, up = moment.arrows.T.tolist()
    axes.quiver(x, y, along, up, color=FAKE, angles="xy", scale_units="xy", scale=1, width=0.008)


def few_steps(path: Path, table: Mapping[str, Sequence[Cell]], beside: tuple[Cell, Cell]) -> None:
    """Draw samples, a column a network, a row a number of steps; beside them data, and others."""
    rows = max(map(len, table.values()))
    figure = Figure(figsize=(12, 2.62 * rows))
    grid = figure.add_gridspec(rows, len(table) + 2, width_ratios=[1] * len(table) + [0.1, 1])
    grid.update(left=0.03, right=0.995, top=0.95, bottom=0.035, wspace=0.06, hspace=0.2)
    for column, (name, cells) in enumerate(table.items()):
        for row, cell in enumerate(cells):
            axes = figure.add_subplot(grid[row, column])
            _cell(axes, cell, ONE)
            if row == 0:
                axes.set_title(name, fontsize=13)
            if column == 0:
                axes.set_ylabel(cell.title, fontsize=13)
    for row, cell in zip((0, rows - 1), beside, strict=True):
        axes = figure.add_subplot(grid[row, -1])
        _cell(axes, cell, ONE if row else DATA)
        axes.set_title(cell.title, fontsize=13)
    save(figure, path)


def _cell(axes: Axes, cell: Cell, color: str) -> None:
    """Draw samples and what was measured on them."""
    cloud(axes, cell.points, color)
    axes.set_xlabel(f"distance {cell.distance:.3f}, astray {cell.astray:.0%}", fontsize=10)
