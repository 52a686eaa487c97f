"""The last word of a run: `summary.json`, for programs, and a table, for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.reporting.table import plain

FILE = "summary.json"


def conclude(folder: Path, summary: dict[str, Any], *, write: bool) -> str:
    """Write a run's summary, whole or not at all, if this process is to, and return its table."""
    if write:
        with whole_file(folder / FILE) as unfinished:
            unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    return table(summary)


def read(folder: Path) -> dict[str, Any]:
    """Read a finished run's summary; UserError if there is none."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: the run has not finished, or this is no run folder")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def table(summary: dict[str, Any]) -> str:
    """Render the results and what real data reach."""
    rows = summary["results"]
    if not rows:
        return "no results: the run was not evaluated"
    return plain(rows, real=summary.get("real"))
