"""Tables of evaluation results, from the rows that `summary.json` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("model", "model", _short),
    ("NFE", "nfe", _short),
    ("steps", "steps", _short),
    ("style", "style", _short),
    ("guidance", "guidance", _short),
    ("s", "stochasticity", _short),
    ("GenEval", "geneval", _number(3)),
    ("DPG", "dpg", _number(1)),
    ("accuracy", "accuracy", _number(3)),
    ("Frechet", "frechet", _number(2)),
    ("KID", "kernel", _number(4)),
    ("+-", "kernel_error", _number(4)),
    ("precision", "precision", _number(3)),
    ("recall", "recall", _number(3)),
    ("density", "density", _number(3)),
    ("coverage", "coverage", _number(3)),
    ("CLIP", "clip_score", _number(2)),
    ("diversity", "diversity", _number(2)),
    ("over seeds", "seed_diversity", _number(3)),
    ("s/image", "seconds_per_image", _number(4)),
    ("latency", "latency", _number(4)),
    ("images/s", "images_per_second", _number(2)),
)
"""Heading, key of the row, and how a value is written."""

LEFT = ("model", "style")


def plain(rows: Sequence[Row], *, real: Row | None = None) -> str:
    """Return an aligned table for a terminal; `real` adds what real images reach as a last row."""
    table = cells(rows, real)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(_aligned(line, table[0], widths)).rstrip() for line in table)


def markdown(rows: Sequence[Row], *, real: Row | None = None) -> str:
    """Return the same table as Markdown."""
    table = cells(rows, real)
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"| {' | '.join(_aligned(line, table[0], widths))} |" for line in table]
    rule = [
        "-" * width if heading in LEFT else "-" * (width - 1) + ":"
        for heading, width in zip(table[0], widths, strict=True)
    ]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def cells(rows: Sequence[Row], real: Row | None) -> list[list[str]]:
    """Return headings and cells; columns that no row has are left out."""
    rows = [*rows, {"model": "real", **real}] if real else rows
    shown = [
        column for column in COLUMNS if column[1] == "model" or any(column[1] in r for r in rows)
    ]
    return [
        [heading for heading, _, _ in shown],
        *([_cell(row, key, write) for _, key, write in shown] for row in rows),
    ]


def _cell(row: Row, key: str, write: Callable[[Any], str]) -> str:
    """Write one value: empty if the row does not have it, `nan` if it is undefined."""
    if key == "stochasticity" and row.get("sde"):
        return "sde"
    if key not in row:
        return ""
    text = "nan" if row[key] is None else write(row[key])
    return " ".join(text.split()).replace("|", "/")


def _aligned(line: Sequence[str], headings: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad cells to their columns' widths, words to the left and numbers to the right."""
    return [
        cell.ljust(width) if heading in LEFT else cell.rjust(width)
        for cell, heading, width in zip(line, headings, widths, strict=True)
    ]
