"""Weights that are not one diffusers folder: several of them, or a file of torch's."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twinflow_train.errors import UserError, listed
from twinflow_train.models.weights import Weights


class JoinedWeights:
    """Weights from several places, each for the names with its prefix, which it does not see.

    parts: by prefix; the first that fits is asked.
    """

    def __init__(self, parts: Mapping[str, Weights]) -> None:
        self._parts = parts

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Read rows [start, stop); UserError if missing or of another shape."""
        prefix = next(prefix for prefix in self._parts if name.startswith(prefix))
        return self._parts[prefix].read(name.removeprefix(prefix), shape, start, stop)


class TorchWeights:
    """Tensors by name in a file that torch.save wrote, of which nothing is executed.

    names: of all the network's parameters. others: prefixes of what the file may hold besides.
    fresh: weights of names that it lacks, by their prefix.

    Raises:
        UserError: it is missing, damaged, not of tensors alone, or of another model.
    """

    def __init__(
        self,
        path: Path,
        *,
        names: Collection[str],
        others: Sequence[str],
        fresh: Mapping[str, Weights],
    ) -> None:
        self._path, self._fresh = path, fresh
        self._tensors = load_tensors(path)
        lacks = sorted(
            name for name in set(names) - self._tensors.keys() if not name.startswith(tuple(fresh))
        )
        if lacks:
            raise UserError(
                f"init_from: {path} lacks {len(lacks)} of {len(names)} tensors: {listed(lacks)}; "
                "choose the matching model=, or a checkpoint that was not cut down"
            )
        more = sorted(
            name for name in self._tensors.keys() - set(names) if not name.startswith(tuple(others))
        )
        if more:
            raise UserError(
                f"init_from: {path} has {len(more)} tensors that the model has no place for: "
                f"{listed(more)}; choose the matching model="
            )

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Read rows [start, stop); UserError if of another shape."""
        if name not in self._tensors:
            prefix = next(prefix for prefix in self._fresh if name.startswith(prefix))
            return self._fresh[prefix].read(name, shape, start, stop)
        stored = self._tensors[name]
        if stored.shape != shape:
            raise UserError(
                f"init_from: {name} in {self._path} has shape {tuple(stored.shape)}, the model "
                f"wants {tuple(shape)}; choose the matching model="
            )
        return stored[start:stop] if len(shape) else stored


def load_tensors(path: Path, *, option: str = "init_from") -> dict[str, Tensor]:
    """Map a file that torch.save wrote into memory, and return its tensors by their names.

    Only what torch calls weights is read, so that a file can execute nothing.

    Raises:
        UserError: it is missing, damaged, or holds other things; `option` named it.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{option}: {path} does not exist") from error
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{option}: {path} cannot be read as tensors ({' '.join(str(error).split())[:200]}); "
            "get it anew"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{option}: {path} does not hold tensors by their names; get it anew")
    return found
