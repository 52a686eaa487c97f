"""What goes out with exported weights: a model card, and how to sample with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import FEW, MANY, Sampler, Style
from twinflow_train.reporting.table import markdown

SETTINGS = "sampler.json"
MODEL = "model.json"
CARD = "README.md"
WEIGHTS = {"average": "averaged weights", "slow": "slowly averaged weights", "model": "raw weights"}
FILL_IN = "FILL IN: the licence of the base model and of the data decide"


def write(
    folder: Path,
    *,
    manifest: Mapping[str, Any],
    holds: str,
    kind: str,
    step: int,
    samples: int,
    summary: Mapping[str, Any],
) -> None:
    """Write card, model and sampler settings into an export's folder.

    manifest: the run's. holds: the beginning of a sentence, which names the files of weights.
    kind: of the weights. summary: results of this step, as in `summary.json`, or nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samplers = MANY if _many(manifest) else FEW
    settings = [_plain(sampler) for sampler in samplers.values()]
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    first = manifest["data"][0]
    said = {"model": manifest["config"]["model"]} | {
        key: first[key]
        for key in ("encoder", "revision", "null_prompt", "latent_shapes")
        if key in first  # older runs have not all of them
    }
    (folder / MODEL).write_text(json.dumps(said, indent=2) + "\n")
    lines = _card(manifest, holds=holds, kind=kind, step=step, samples=samples, summary=summary)
    (folder / CARD).write_text("\n".join(lines) + "\n")


def read_model(folder: Path) -> dict[str, Any] | None:
    """Read which model and encoders an export is of; None if the folder is no export.

    Keys: "model", as in a run's manifest; "encoder", "revision", "null_prompt" and
    "latent_shapes" of its data.
    """
    path = folder / MODEL
    if not path.is_file():
        return None
    said = _read(path)
    if (
        not isinstance(said, dict)
        or not isinstance(said.get("model"), dict)
        or "encoder" not in said
    ):
        raise UserError(f"{path} is damaged: it does not say the model; export again")
    return said


def _read(path: Path) -> Any:
    """Read JSON; UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); export again") from error


def read_samplers(folder: Path) -> list[Sampler]:
    """Read the settings that travel with weights."""
    said = _read(folder / SETTINGS)
    try:
        return [Sampler(**(each | {"style": Style[each["style"]]})) for each in said]
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder / SETTINGS} is damaged ({error!r}); export again") from error


def _many(manifest: Mapping[str, Any]) -> bool:
    """Tell whether the objective was plain flow matching, which makes a multi-step base."""
    objective = manifest["config"]["objective"]
    return not objective["order"] and not objective["rectify_weight"]


def _plain(sampler: Sampler) -> dict[str, Any]:
    values = asdict(sampler)
    return {k: v.name if isinstance(v, Enum) else v for k, v in values.items()}


def _card(
    manifest: Mapping[str, Any],
    *,
    holds: str,
    kind: str,
    step: int,
    samples: int,
    summary: Mapping[str, Any],
) -> Iterator[str]:
    """Yield the card's lines."""
    config, about = manifest["config"], manifest["data"]
    tags = "flow-matching" if _many(manifest) else "twinflow, few-step"
    yield from ["---", f'license: "{FILL_IN}"', "library_name: diffusers"]
    yield from ["pipeline_tag: text-to-image", f"tags: [{tags}]", "---", ""]
    yield from [f"# {config['name']}", ""]
    yield (
        f"A {config['model']['_type']} transformer that {_does(manifest)}, by TwinFlow Train "
        f"{manifest['twinflow_train']}. "
        f"{holds} the {WEIGHTS[kind]} after {step:,} steps on {samples:,} samples; "
        f"`{SETTINGS}` says how to sample."
    )
    yield from ["", "## How it was made", ""]
    yield f"- start: {_public(config['init_from']) if config['init_from'] else 'random weights'}"
    mixed = [part["path"] for part in config["data"].get("mix", [])]
    yield f"- data: {', '.join(map(_public, (config['data']['path'], *mixed)))}"
    for each in about:
        yield from (
            f"- {name.replace('_', ' ')} of the data: {value}" for name, value in each.items()
        )
    yield f"- batch {config['batch']}, {config['optim']['_type']}, {_settings(config['optim'])}"
    if adapter := _settings(config.get("adapter", {})):
        yield f"- adapter {config['adapter']['_type']}: {adapter}"
    yield f"- objective {config['objective']['_type']}: {_settings(config['objective'])}"
    yield f"- seed {config['seed']}, code {manifest['commit'] or 'not from a checkout'}"
    rows = _of(summary.get("results", []), kind)
    if rows:
        yield from ["", "## Results", "", markdown(rows, real=summary.get("real"))]


def _does(manifest: Mapping[str, Any]) -> str:
    if _many(manifest):
        return "draws in many steps, trained by flow matching"
    return "draws in one, two or four steps, trained with TwinFlow (arXiv 2512.05150)"


def _public(place: str) -> str:
    """Name a place without saying where on a machine, or behind which URL, it lies."""
    path = PurePosixPath(place)
    return path.name if path.is_absolute() or "://" in place or ".." in path.parts else place


def _of(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Keep the rows of these weights and of the base."""
    shown = {"average": "ema", "slow": "slow", "model": "raw"}[kind]
    return [row for row in rows if row["model"] in ("base", shown)]


def _settings(values: Mapping[str, Any]) -> str:
    """Write settings in one line."""
    parts = [
        f"{key} ({_settings(value)})" if isinstance(value, Mapping) else f"{key} {_value(value)}"
        for key, value in values.items()
        if key != "_type"
    ]
    return ", ".join(parts)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
