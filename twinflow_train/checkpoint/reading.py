"""Whole tensors out of a checkpoint, without the engine that wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from twinflow_train.checkpoint.index import Index
from twinflow_train.checkpoint.inspecting import find
from twinflow_train.checkpoint.ranges import DamageError, RangeFile
from twinflow_train.checkpoint.saving import PARTIAL, step_of
from twinflow_train.errors import UserError
from twinflow_train.place import cause


def choose(where: str, *, step: int | None) -> Index:
    """Open the newest checkpoint at a place (see `find`), or the one of a step.

    Raises:
        UserError: it is not there, or damaged.
    """
    places = {step_of(p.name): p for p in find(where) if not p.name.endswith(PARTIAL)}
    if not places or (step is not None and step not in places):
        there = ", ".join(str(n) for n in places) or "none"
        raise UserError(f"{where} holds no checkpoint of step {step}; there are: {there}")
    place = places[step] if step is not None else list(places.values())[-1]
    try:
        return Index.read(place)
    except (DamageError, OSError) as error:
        raise UserError(f"{place}: {cause(error)}; choose another step") from error


def kinds(index: Index) -> list[str]:
    """Name what a checkpoint holds of every parameter: "model", averages and moments."""
    return list(dict.fromkeys(key.partition("/")[0] for key in index.tensors))


def whole(index: Index, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of one kind, each put together from its ranges when it is asked for.

    Raises:
        UserError: a file is missing or not what the index says. Run `verify` for its bytes.
    """
    with ExitStack() as stack:
        opened: dict[str, RangeFile] = {}
        for key, entry in index.tensors.items():
            if key.partition("/")[0] != kind:
                continue
            flat = torch.empty(math.prod(entry["shape"]), dtype=torch.float32)
            try:
                for file, offset, length in entry["pieces"]:
                    if file not in opened:
                        opened[file] = stack.enter_context(RangeFile.open(index.folder / file))
                    for part in opened[file].parts(key, 0, length):
                        flat[offset : offset + len(part)] = part
                        offset += len(part)
            except (DamageError, OSError) as error:
                raise UserError(f"{index.folder}: {cause(error)}; choose another step") from error
            yield key.partition("/")[2], flat.view(entry["shape"])
