"""Where a network's numbers come from and go to: random draws, and folders of safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twinflow_train.errors import UserError, listed
from twinflow_train.files import save_tensors, whole_folder
from twinflow_train.rng import generator

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 1024**3
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What pipelines call a LoRA's file."""


@runtime_checkable
class Weights(Protocol):
    """Where parameters come from: rows [start, stop) of a named tensor along its first axis."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Return the rows, on the CPU."""
        ...


class RandomWeights:
    """Random initial values, each a function of (seed, name).

    rule(name, shape) returns ("normal", std) or ("constant", value). Aliases share another name's
    values.
    """

    def __init__(
        self,
        seed: int,
        rule: Callable[[str, torch.Size], tuple[str, float]],
        aliases: Mapping[str, str],
    ) -> None:
        self.seed = seed
        self.rule = rule
        self.aliases = aliases

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Draw the whole tensor and return rows [start, stop)."""
        name = _aliased(name, self.aliases)
        kind, value = self.rule(name, shape)
        if kind == "constant":
            return torch.full(shape, value)[start:stop]
        draw = torch.randn(shape, generator=generator("weights", self.seed, name))
        return draw[start:stop] * value


class StoredWeights:
    """Safetensors of a diffusers folder (its `transformer/`, or the folder itself), read by slices.

    config: what config.json shall say; absent: what it says of keys that it does not have.
    names: of all the network's parameters; files with others are refused. Names that the files
    lack are looked up under their alias, or read from the weights in `fresh` under their prefix: a
    pretrained base has no second time embedder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: dict[str, object],
        absent: Mapping[str, object],
        names: Collection[str],
        aliases: Mapping[str, str],
        fresh: Mapping[str, Weights],
    ) -> None:
        self.folder = inner(folder)
        self.aliases, self.fresh = aliases, fresh
        _check_config(self.folder, config, absent)
        self.files = _weight_map(self.folder)
        if others := sorted(self.files.keys() - set(names)):
            raise UserError(
                f"init_from: {self.folder} has {len(others)} tensors that the model has no place "
                f"for: {listed(others)}; choose the matching model= and model.target_time="
            )

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) from disk; UserError if missing or of another shape.

        The file may have the tensor with a first axis of one that `shape` does not have.
        """
        if name not in self.files:
            name = _aliased(name, self.aliases)
        if name not in self.files:
            for prefix, weights in self.fresh.items():
                if name.startswith(prefix):
                    return weights.read(name, shape, start, stop)
            raise UserError(
                f"init_from: {self.folder} has no tensor {name!r}: other model or damaged folder"
            )
        with _opened(self.folder / self.files[name]) as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) == (1, *shape) and len(shape):
                within: Tensor = stored[0:1, start:stop]
                return within[0]
            if tuple(stored.get_shape()) != tuple(shape):
                raise UserError(
                    f"init_from: {name} in {self.folder} has shape {tuple(stored.get_shape())}, "
                    f"the model wants {tuple(shape)}; choose the matching model="
                )
            rows: Tensor = stored[start:stop] if len(shape) else file.get_tensor(name)
            return rows


def _aliased(name: str, aliases: Mapping[str, str]) -> str:
    for prefix, other in aliases.items():
        if name.startswith(prefix):
            return other + name[len(prefix) :]
    return name


def _check_config(folder: Path, config: dict[str, object], absent: Mapping[str, object]) -> None:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"init_from: {folder} does not exist; give a diffusers folder or an export of a run"
        )
    if (folder / LORA_FILE).is_file():
        raise UserError(
            f"init_from: {folder} holds a LoRA and not the network that it is for; write both "
            "as one, python -m twinflow_train.export RUN --merge, and give that folder"
        )
    if not path.is_file():
        raise UserError(
            f"init_from: {folder} has no config.json; give a diffusers folder or an export of a run"
        )
    for key, there, value in differences(_json(path), config, absent):
        raise UserError(
            f"init_from: {folder} is another model: its {key} is {there}, "
            f"the configuration's is {value}"
        )


def differences(
    stored: Mapping[str, object], config: Mapping[str, object], absent: Mapping[str, object]
) -> Iterator[tuple[str, object, object]]:
    """Yield (key, its value there, value wanted) where a config.json is another model's.

    absent: what it says of keys that it does not have; of others, what is wanted.
    """
    for key, value in config.items():
        there = stored.get(key, absent.get(key, value))
        if json.dumps(there) != json.dumps(value):
            yield key, there, value


def inner(folder: Path) -> Path:
    """Return the transformer's folder of a pipeline or an export, or the folder itself."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a transformer; empty if there is none, UserError if it is damaged."""
    path = inner(folder) / "config.json"
    return _json(path) if path.is_file() else {}


def tensor_names(folder: Path) -> list[str]:
    """List the tensors of a transformer's files; UserError if there are none."""
    return list(_weight_map(inner(folder)))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tell which file holds each tensor: plain files, or where there are none those of a type."""
    for kind in ("", ".bf16", ".fp16"):
        index = folder / f"{WEIGHTS}.safetensors.index{kind}.json"
        if index.is_file():
            found = _json(index).get("weight_map")
            if not isinstance(found, dict):
                raise UserError(f"init_from: {index} is damaged: no weight_map; get it anew")
            return found
        single = folder / f"{WEIGHTS}{kind}.safetensors"
        if single.is_file():
            with _opened(single) as file:
                return dict.fromkeys(file.keys(), single.name)
    raise UserError(
        f"init_from: {folder} has no {WEIGHTS}.safetensors and no {WEIGHTS}.safetensors.index.json"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; UserError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            f"init_from: {path} is missing or damaged ({error}); get it anew"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"init_from: {path} is damaged ({error}); get it anew") from error
    if not isinstance(found, dict):
        raise UserError(f"init_from: {path} is damaged: it holds no object; get it anew")
    return found


def save_folder(
    folder: Path, config: dict[str, object], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write a diffusers transformer folder: config.json and safetensors split at 5 GB.

    `tensors` yields (stored name, whole tensor); they are written as they come, a file at a time.
    The folder appears, and replaces an older one, when it is whole.
    """
    with whole_folder(folder) as unfinished:
        _write_parts(unfinished, tensors)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_parts(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors in files of at most 5 GB (or of one tensor), and name them."""
    parts: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        part = folder / f"part-{len(parts)}.safetensors"
        save_tensors(pending, part, metadata={"format": "pt"})
        parts.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if pending and size + bytes_here > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size += bytes_here
        total += bytes_here
    flush()
    _name_parts(folder, parts, total)


def _name_parts(folder: Path, parts: list[list[str]], total: int) -> None:
    """Give the written parts their final names, and an index when there are several."""
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts):
        one = f"{WEIGHTS}.safetensors"
        several = f"{WEIGHTS}-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        final = one if len(parts) == 1 else several
        (folder / f"part-{i}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )
