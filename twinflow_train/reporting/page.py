"""A page on one or more runs: one HTML file that needs no network and no server."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.reporting import summary
from twinflow_train.reporting.table import cells
from twinflow_train.scrub import scrub

TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 400
"""Points of a curve: a longer one is averaged over equal stretches of steps."""
PICTURES = 24
"""Pictures of a run: more are thinned out evenly."""
PICTURE_BYTES = 24_000_000
"""Of all pictures of runs on the page, unless told."""
LIGHT_BYTES, LIGHT_SIDE = 1_000_000, 2000
"""Of one picture; a larger one is shown as a JPEG of at most so many pixels a side."""
SMALL_BYTES = 40_000
"""Where even such small pictures are too many, some are left out."""
SECTIONS = {
    "Losses": ("loss/", "eval/raw/heldout/", "eval/ema/heldout/", "eval/slow/heldout/"),
    "Quality": ("eval/",),
    "Health": ("health/", "norm/", "delta_v/", "residual/", "faults/"),
    "Speed": ("time/", "speed/", "memory/", "data/"),
}
"""Titles, and how the names of their metrics begin; the first that fits has them, or "Others"."""
FIRST = "Quality"
"""What the page begins with."""
SKIPPED = ("step", "samples")

Curve = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Curves:
    """What a run's `metrics.jsonl` says, by metric."""

    found: Mapping[str, Curve]

    @staticmethod
    def read(folder: Path) -> Curves:
        """Read a run's metrics; a line that a killed run left unfinished is left out."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing: {folder} is no run's folder")
        found: dict[str, Curve] = {}
        with path.open() as lines:
            for line in lines:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue
                for name, value in said.items():
                    if name not in SKIPPED and isinstance(value, int | float | None):
                        found.setdefault(name, []).append((said["step"], value))
        return Curves({name: _thinned(curve) for name, curve in sorted(found.items())})


def write(
    folders: Sequence[Path],
    path: Path,
    *,
    evaluations: Sequence[Path] = (),
    picture_bytes: int = PICTURE_BYTES,
) -> None:
    """Write a page on runs, and on what `twinflow_train.evaluate` wrote to `evaluations`.

    picture_bytes: of all pictures of runs; they are made smaller, then fewer, until they fit.

    Raises:
        UserError: a folder is no run's, or no evaluation's, or the page cannot be written.
    """
    light = min(LIGHT_BYTES, picture_bytes // 4)
    found = [_evaluation(folder, light) for folder in evaluations]
    data = _data(folders, picture_bytes) | {"evaluations": found}
    page = TEMPLATE.read_text().replace("DATA", _json(data), 1)
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(page)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror})") from error


def _json(data: Any) -> str:
    """Write JSON that can stand inside of a page: nothing in it ends the script or opens a tag."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _data(folders: Sequence[Path], picture_bytes: int) -> dict[str, Any]:
    """Gather what the page shows."""
    curves = [Curves.read(folder) for folder in folders]
    manifests = [_manifest(folder) for folder in folders]
    names = _distinct([m.get("name") or folder.name for m, folder in zip(manifests, folders,
                                                                         strict=True)])  # fmt: skip
    drawn = sum((folder / "samples").is_dir() for folder in folders)
    each = picture_bytes // max(drawn, 1)
    return {
        "runs": [
            {"name": name, "pictures": list(_pictures(folder, each))}
            for name, folder in zip(names, folders, strict=True)
        ],
        "results": _results(names, folders),
        "sections": list(_sections(curves, [list(_bases(folder)) for folder in folders])),
        "settings": _settings(manifests),
    }


def _evaluation(folder: Path, light: int) -> dict[str, Any]:
    """Return the table and the pictures of an evaluation, each of at most `light` bytes."""
    path = folder / "results.json"
    try:
        said = json.loads(path.read_text())
        head, *rows = cells(said["results"], said.get("real"))
        asked = f"{said['suite']}: {said['prompts']:,} prompts, {said['images']:,} of each"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--evaluation: {path} was not written by twinflow_train.evaluate ({error!r})"
        ) from error
    shown = [folder / name for name in ("quality.png", "grid.png")]
    return {
        "name": folder.name,
        "asked": asked,
        "head": head,
        "rows": rows,
        "pictures": [_embedded(picture, light) for picture in shown if picture.is_file()],
    }


def _manifest(folder: Path) -> dict[str, Any]:
    """Return a run's configuration, flat; empty where there is no manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    said = json.loads(path.read_text())
    flat = dict(_flat(said["config"]))
    for key in ("commit", "ranks", "device", "twinflow_train"):
        flat[f"({key})"] = said.get(key)
    found: dict[str, Any] = scrub(flat)
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float | bool | None)
            yield f"{prefix}{key}", value if plain else json.dumps(value)


def _distinct(names: Sequence[str]) -> list[str]:
    """Number names that are there more than once."""
    return [name if names.count(name) == 1 else f"{name} ({n + 1})" for n, name in enumerate(names)]


def _results(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the table of final results of the runs that have ended."""
    head: list[str] = []
    rows: list[list[str]] = []
    for name, folder in zip(names, folders, strict=True):
        if not (folder / summary.FILE).is_file():
            continue
        said = summary.read(folder)
        if said["results"]:
            own, *table = cells(said["results"], said.get("real"))
            head = ["run", *own] if len(own) + 1 > len(head) else head
            rows += [[name, *row] for row in table]
    return {"head": head or ["no run has ended with results"], "rows": rows}


def _settings(manifests: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    keys = dict.fromkeys(key for manifest in manifests for key in manifest)
    return [[key, *(_said(manifest.get(key)) for manifest in manifests)] for key in keys]


def _said(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool | None) else value


def _bases(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield names and scores of what a run that has ended made of the base, once."""
    if (folder / summary.FILE).is_file():
        for row in summary.read(folder)["results"]:
            if row["model"] == "base":
                guided = f" guidance {row['guidance']:g}" if row.get("guidance", 1) != 1 else ""
                yield f"base nfe{row['nfe']}{guided}", row


def _sections(
    curves: Sequence[Curves], bases: Sequence[Sequence[tuple[str, Mapping[str, Any]]]]
) -> Iterator[dict[str, Any]]:
    """Yield titles with their charts."""
    left = list(dict.fromkeys(name for one in curves for name in one.found))
    found = {}
    for title, begins in (SECTIONS | {"Others": ("",)}).items():
        mine = [name for name in left if name.startswith(begins)]
        left = [name for name in left if not name.startswith(begins)]
        charts = _scores(mine, curves, bases) if title == FIRST else _plain(mine, curves)
        found[title] = {"title": title, "charts": list(charts)}
    ordered = [found.pop(FIRST), *found.values()]
    yield from (section for section in ordered if section["charts"])


def _scores(
    names: Iterable[str],
    curves: Sequence[Curves],
    bases: Sequence[Sequence[tuple[str, Mapping[str, Any]]]],
) -> Iterator[dict[str, Any]]:
    """Yield a chart a score: a line for each network and sampler, and level ones for the base."""
    scores: dict[str, dict[str, str]] = {}
    for name in names:
        _, *who, score = name.split("/")
        scores.setdefault(score, {})[" ".join(who) or score] = name
    for score, lines in scores.items():
        # Averages are what a run is for: others are there, but not at first sight.
        preferred = any(label.startswith("ema") for label in lines)
        drawn = [
            line | {"hidden": preferred and not label.startswith("ema")}
            for label, name in lines.items()
            for line in _lines(label, name, curves)
        ]
        steps = [step for line in drawn for step, _ in line["points"]]
        for run, rows in enumerate(bases):
            there = [(label, row[score]) for label, row in rows if row.get(score) is not None]
            for label, value in there:
                level = [(min(steps), value), (max(steps), value)]
                hidden = label != there[-1][0]
                drawn.append({"label": label, "run": run, "points": level, "hidden": hidden})
        yield {"title": score.replace("_", " "), "lines": drawn}


def _plain(names: Iterable[str], curves: Sequence[Curves]) -> Iterator[dict[str, Any]]:
    """Yield a chart a metric."""
    for name in names:
        lines = [line | {"hidden": False} for line in _lines(name, name, curves)]
        yield {"title": name, "lines": lines}


def _lines(label: str, name: str, curves: Sequence[Curves]) -> Iterator[dict[str, Any]]:
    for run, one in enumerate(curves):
        if name in one.found:
            yield {"label": label, "run": run, "points": one.found[name]}


def _thinned(curve: Curve) -> Curve:
    """Average a long curve over equal stretches; what is not finite is left out of means."""
    size = -(-len(curve) // POINTS)
    found: Curve = []
    for start in range(0, len(curve), size):
        part = curve[start : start + size]
        values = [value for _, value in part if value is not None and math.isfinite(value)]
        mean = float(f"{sum(values) / len(values):.6g}") if values else None
        found.append((part[len(part) // 2][0], mean))
    return found


def _pictures(folder: Path, most_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield a run's pictures, the last one always among them.

    Where they are too large together each is made smaller, and where that is not enough they are
    thinned evenly.
    """
    there = sorted((folder / "samples").glob("step-*.png"))
    many = min(len(there), PICTURES)
    if sum(min(path.stat().st_size, LIGHT_BYTES) for path in there[-many:]) > most_bytes:
        many = max(1, min(many, most_bytes // SMALL_BYTES))
    chosen = [there[len(there) - 1 - n * len(there) // many] for n in range(many)] if there else []
    for path in reversed(chosen):
        png = _embedded(path, min(LIGHT_BYTES, most_bytes // many))
        yield {"step": int(path.stem.partition("-")[2]), "png": png}


def _embedded(path: Path, most_bytes: int) -> str:
    """Return a picture as a URL that holds it: the file itself, or a smaller one if it is large."""
    kind, content, side = "png", path.read_bytes(), LIGHT_SIDE
    while len(content) > most_bytes and side > LIGHT_SIDE // 8:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
        small.thumbnail((side, side))
        light = BytesIO()
        small.save(light, format="JPEG", quality=85)
        kind, content, side = "jpeg", light.getvalue(), side * 4 // 5
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
