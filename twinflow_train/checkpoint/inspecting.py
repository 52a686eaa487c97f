"""What a checkpoint is, for people, and whether it is whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from twinflow_train.checkpoint.index import INDEX, SEAL, Index, damage
from twinflow_train.checkpoint.ranges import DamageError
from twinflow_train.checkpoint.saving import PARTIAL, step_of
from twinflow_train.errors import UserError
from twinflow_train.place import Place, cause, readable

SIZES = {"torch.float64": 8, "torch.int64": 8, "torch.float32": 4, "torch.int32": 4}
"""Bytes of a number of a type; of those that are not here, two or one."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One checkpoint described; `fault` says what is wrong with it, empty if nothing is."""

    text: str
    fault: str


def find(where: str) -> list[Place]:
    """List the checkpoints at a checkpoint's folder, a folder of them, or a run's folder.

    Raises:
        UserError: there is none.
    """
    top = Place.of(where)
    try:
        names = top.names()
        if {INDEX, SEAL} & set(names) or (step_of(top.name) is not None and names):
            return [top]
        for folder in (top, top / "checkpoints"):
            steps = [(n, name) for name in folder.names() if (n := step_of(name)) is not None]
            if steps:
                return [folder / name for _, name in sorted(steps)]
    except OSError as error:
        raise UserError(f"{top} cannot be read: {cause(error)}") from error
    raise UserError(f"{top} holds no checkpoint: give a checkpoint's folder, or a run's")


def look(folder: Place, *, bytewise: bool) -> Finding:
    """Describe a checkpoint; bytewise: read and verify all of it, not only its headers."""
    if folder.name.endswith(PARTIAL):
        text = f"{folder}\n  being written, or left behind by a run that died"
        return Finding(text=text, fault="")
    try:
        index = Index.read(folder)
    except (DamageError, OSError) as error:
        fault = str(error) if isinstance(error, DamageError) else f"{folder}: {cause(error)}"
        return Finding(text=f"{folder}\n  DAMAGED: {fault}", fault=fault)
    try:
        fault = damage(index, sorted(index.files), bytewise=bytewise)
    except OSError as error:
        fault = f"{folder} cannot be read: {cause(error)}"
    whole = "whole: every byte was verified" if bytewise else "whole, as far as headers tell"
    verdict = f"DAMAGED: {fault}" if fault else whole
    return Finding(text="\n  ".join([str(folder), *_facts(index), verdict]), fault=fault)


def _facts(index: Index) -> Iterator[str]:
    """Yield lines about what a checkpoint holds."""
    step, samples = index.progress["step"], index.progress["samples"]
    yield f"step {step:,}, {samples:,} samples, {index.updates:,} updates; format {index.version}"
    kinds: dict[str, list[tuple[int, int]]] = {}
    for key, entry in index.tensors.items():
        numbers = math.prod(entry["shape"])
        wide = SIZES.get(entry["dtype"], 1 if entry["dtype"].endswith("int8") else 2)
        kinds.setdefault(key.partition("/")[0], []).append((numbers, numbers * wide))
    parameters = sum(numbers for numbers, _ in kinds.get("model", []))
    yield f"model: {_kind(index.run, 'model')}, {parameters:,} parameters"
    yield f"objective: {_kind(index.run, 'objective')}"
    for kind, sizes in kinds.items():
        yield f"{kind}: {len(sizes)} tensors, {readable(sum(size for _, size in sizes))}"
    ranks = len(index.files)
    yield f"written by {ranks} rank{'s' if ranks > 1 else ''}"


def _kind(run: Any, part: str) -> str:
    """Give the class of a part of the run, and its settings."""
    settings = dict(run.get(part, {}))
    name = settings.pop("_type", "of unknown class")
    return f"{name} ({', '.join(f'{key}={_short(value)}' for key, value in settings.items())})"


def _short(value: Any) -> str:
    """Write a setting on little room."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items() if k != "_type") + "}"
    return str(value)
