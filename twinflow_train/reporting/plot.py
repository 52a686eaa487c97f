"""Quality against cost, as a picture: one line a model, over evaluations and over seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

QUALITIES = (
    ("geneval", "GenEval (more is better)"),
    ("dpg", "DPG-Bench (more is better)"),
    ("frechet", "Frechet distance (less is better)"),
    ("clip_score", "CLIP score (more is better)"),
    ("accuracy", "accuracy (more is better)"),
)
"""Scores by importance: the first that rows have is drawn."""
COSTS = (("nfe", "network evaluations"), ("seconds_per_image", "seconds an image"))
COLOURS = ("#1f5fa8", "#c8501e", "#2e8540", "#7b3fa0", "#8a6d1a", "#555555")
PANEL, MARGIN, TOP, BOTTOM, FONT = 460, 70, 50, 60, 14
INK, FAINT = "#222222", "#dddddd"


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Maps values to pixels. log: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @staticmethod
    def of(values: Sequence[float], start: float, end: float, *, log: bool) -> _Axis:
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.3, high * 1.3
        else:
            room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
            low, high = low - room, high + room
        return _Axis(low=low, high=high, start=start, end=end, log=log)

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        bend = math.log if self.log else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return some round values."""
        if self.log:
            doubled = [2.0**k for k in range(21)]
            decades = [d * 10.0**k for k in range(-6, 6) for d in (1, 2, 5)]
            known = doubled if self.low > 0.5 else decades
            found = [value for value in known if self.low <= value <= self.high]
            return found[:: max(1, -(-len(found) // 7))]
        unit = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(s * unit for s in (0.2, 0.5, 1, 2) if (self.high - self.low) / (s * unit) <= 7)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, first + 8) if k * step <= self.high]


def quality(rows: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Draw the most telling score that results have; None if they have none of QUALITIES."""
    for key, title in QUALITIES:
        shown = [row for row in rows if row.get(key) is not None]
        if shown:
            return _drawn(shown, key, title)
    return None


def _drawn(rows: Sequence[Mapping[str, Any]], key: str, title: str) -> Image.Image:
    """Draw both panels and the names of the models."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = {model: COLOURS[n % len(COLOURS)] for n, model in enumerate(models)}
    font = ImageFont.load_default(FONT)
    costs = [cost for cost in COSTS if all(row.get(cost[0]) for row in rows)]
    high = TOP + PANEL + BOTTOM + (FONT + 6) * len(models)
    canvas = Image.new("RGB", ((MARGIN + PANEL + 20) * len(costs), high), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, TOP / 3), title, INK, font=font)
    for place, (cost, name) in enumerate(costs):
        left = MARGIN + place * (MARGIN + PANEL + 20)
        _panel(pen, rows, key, cost, name, left, colours, font)
    for number, model in enumerate(models):
        line = TOP + PANEL + BOTTOM + number * (FONT + 6) - 8
        pen.line((MARGIN, line + FONT / 2, MARGIN + 30, line + FONT / 2), colours[model], 3)
        pen.text((MARGIN + 40, line), str(model)[:80], INK, font=font)
    return canvas


def _panel(
    pen: ImageDraw.ImageDraw,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    cost: str,
    name: str,
    left: int,
    colours: Mapping[str, str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw one panel: axes, then a line and dots of each model."""
    across = _Axis.of([row[cost] for row in rows], left, left + PANEL, log=True)
    up = _Axis.of([row[key] for row in rows], TOP + PANEL, TOP, log=False)
    for value in across.ticks():
        x = across.at(value)
        pen.line((x, TOP, x, TOP + PANEL), FAINT)
        pen.text((x, TOP + PANEL + 4), f"{value:.3g}", INK, font=font, anchor="mt")
    for value in up.ticks():
        y = up.at(value)
        pen.line((left, y, left + PANEL, y), FAINT)
        pen.text((left - 6, y), f"{value:.4g}", INK, font=font, anchor="rm")
    pen.rectangle((left, TOP, left + PANEL, TOP + PANEL), outline=INK)
    pen.text((left + PANEL / 2, TOP + PANEL + 24), name, INK, font=font, anchor="mt")
    for model, colour in colours.items():
        own = sorted((row[cost], row[key]) for row in rows if row["model"] == model)
        dots = [(across.at(x), up.at(y)) for x, y in own]
        if len(dots) > 1:
            pen.line(dots, colour, 2)
        for x, y in dots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
