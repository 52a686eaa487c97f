"""One evaluation from its settings to its table."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twinflow_train.dist import World
from twinflow_train.evals import grid
from twinflow_train.evals.results import Result
from twinflow_train.evaluate.contenders import Contender, Entry, contenders
from twinflow_train.evaluate.drawing import PICTURES, draw, seconds
from twinflow_train.evaluate.scoring import scorer
from twinflow_train.evaluate.settings import Evaluating
from twinflow_train.evaluate.suites import Prompt, Suite
from twinflow_train.files import whole_file
from twinflow_train.models.codec import Codec
from twinflow_train.reporting import plot
from twinflow_train.reporting.table import markdown, plain

RESULTS, TABLE, SHEET, PLOT, GRID = (
    "results.json", "results.md", "results.csv", "quality.png", "grid.png",
)  # fmt: skip


def evaluate(settings: Evaluating, world: World) -> list[str]:
    """Draw what is missing, score everything, write it, and return lines that say so; collective.

    Raises:
        UserError: something is missing, or cannot be used; before anything is drawn if it can be
            told then.
    """
    prompts = settings.suite.asked()
    if settings.features is not None:
        settings.features.check()
    found = contenders(settings)
    folder = Path(settings.folder)
    # A rank that draws slowly may let the others wait for long.
    patient = replace(world.aside(), device=world.device) if world.size > 1 else world
    entries: list[Entry] = []
    for who in found:
        entries += draw(
            who,
            suite=settings.suite,
            prompts=prompts,
            batch=settings.batch,
            folder=folder,
            world=world,
        )
    patient.barrier()

    def codec() -> Codec:
        first = found[0]
        assert isinstance(first, Contender)
        encoders = settings.encoders or first.origin.encoders
        return encoders.open(encoders.find(), world.device)

    judge = scorer(settings, prompts, world, codec)
    results = []
    for entry in entries:
        place = folder / entry.folder
        scores = judge.scores(place) if judge else {}
        scores |= settings.suite.scored(place / PICTURES)
        results.append(replace(entry.result, scores=scores | seconds(place)))
    real = judge.reached() if judge else {}
    if world.main:
        _write(settings, prompts, entries, results, real)
    rows = [result.row() for result in results]
    return [plain(rows, real=real), f"tables, plot and pictures: {folder}"]


def _write(
    settings: Evaluating,
    prompts: Sequence[Prompt],
    entries: Sequence[Entry],
    results: Sequence[Result],
    real: dict[str, float],
) -> None:
    """Write numbers for programs, tables for people, the plot and the picture of pictures."""
    folder, rows = Path(settings.folder), [result.row() for result in results]
    said: dict[str, Any] = {
        "suite": settings.suite.name,
        "prompts": len(prompts),
        "images": settings.suite.images,
        "features": settings.features.name if settings.features else None,
        "results": rows,
    } | ({"real": real} if real else {})
    with whole_file(folder / RESULTS) as unfinished:
        unfinished.write_text(json.dumps(said, indent=1) + "\n")
    with whole_file(folder / TABLE) as unfinished:
        unfinished.write_text(_page(said, rows, real))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(folder / SHEET) as unfinished, unfinished.open("w", newline="") as file:
        sheet = csv.DictWriter(file, keys)
        sheet.writeheader()
        sheet.writerows(rows)
    if drawn := plot.quality(rows):
        grid.save(drawn, folder / PLOT)
    shown = prompts[: settings.rows]
    columns = [
        grid.Column(heading=result.heading, images=_images(settings.suite, place, shown))
        for result, place in zip(results, (folder / e.folder for e in entries), strict=True)
    ]
    if len({column.images.shape for column in columns}) == 1:
        grid.save(grid.draw(columns, prompts=[p.text for p in shown]), folder / GRID)


def _page(said: dict[str, Any], rows: list[dict[str, Any]], real: dict[str, float]) -> str:
    """Return the Markdown: the table, and what is to be known to read it."""
    drawn = said["prompts"] * said["images"]
    lines = [
        f"# {said['suite']}: {said['prompts']:,} prompts, {drawn:,} pictures of each model",
        "",
        markdown(rows, real=real),
        "",
    ]
    if real:
        lines += [
            f"The Frechet distance has a bias of few pictures: {real['frechet_bias']:.2f} is what "
            f"{drawn:,} pictures of the real distribution itself would have to first order, and "
            f"two halves of the {real['images']:,} real ones are {real['frechet']:.2f} apart. "
            "Compare only equally many pictures; the kernel distance (KID) has no such bias.",
            "",
        ]
    return "\n".join(lines)


def _images(suite: Suite, place: Path, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Read the first picture of each prompt, in [-1, 1]."""
    found = [
        torch.from_numpy(np.array(suite.read(place / PICTURES, prompt, 0))) for prompt in prompts
    ]
    if len({each.shape for each in found}) > 1:
        return torch.empty(0)
    return torch.stack(found).permute(0, 3, 1, 2).float() / 127.5 - 1
