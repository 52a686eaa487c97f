"""What every model family provides: a network around a stock transformer, and its weights."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from twinflow_train.batch import Condition, Velocity
from twinflow_train.errors import UserError, listed
from twinflow_train.files import save_tensors, whole_folder
from twinflow_train.rng import generator

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 1024**3


class VelocityNet(nn.Module, ABC):
    """F(x_t, t, r, cond) over a stock diffusers transformer, held as `stock`."""

    stock: Any

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        cond: Condition,
    ) -> Float[Tensor, "b c h w"]:
        """Predict the average velocity from t to r in the type of x_t; computes in its own type."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks: units of recomputation, compilation and sharding."""

    @abstractmethod
    def rebuild_constants(self) -> None:
        """Compute anew what is neither parameter nor buffer, after construction on meta."""

    @abstractmethod
    def keep_own_clock(self) -> None:
        """Be asked on the diagonal only, as the stock network is: for a frozen teacher."""

    @abstractmethod
    def recompute(self, call: Callable[..., object]) -> None:
        """Run each block in training as call(block, *inputs) instead of block(*inputs)."""

    def stored_names(self) -> dict[str, str]:
        """Map each parameter's name to its name in weight files: the released weights' names."""
        return {name: self.stored_name(name) for name, _ in self.named_parameters()}

    @abstractmethod
    def stored_name(self, name: str) -> str:
        """Name one parameter as weight files do."""


@runtime_checkable
class Weights(Protocol):
    """Where parameters come from: rows [start, stop) of a named tensor along its first axis."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Return the rows, on the CPU."""
        ...


@dataclass(kw_only=True)
class Model(ABC):
    """A model family at a size: the `model` group of the configuration."""

    @abstractmethod
    def build(self) -> VelocityNet:
        """Build the network on meta, with parameters that no output depends on frozen."""

    @abstractmethod
    def config(self) -> dict[str, object]:
        """Give the stock transformer's configuration, as in its config.json."""

    @abstractmethod
    def random_weights(self, seed: int) -> Weights:
        """Give random initial weights, each a function of (seed, name)."""

    @abstractmethod
    def stored_weights(self, folder: Path) -> Weights:
        """Open a diffusers folder; UserError if it is missing or of another model."""

    @abstractmethod
    def pretrained(self, velocity: Velocity) -> Velocity:
        """Ask a network as the stock one is asked, at t alone: before training, the base model."""

    @abstractmethod
    def check(self, latent: Sequence[int], text_width: int) -> None:
        """Refuse data that does not fit: ValueError with both numbers."""


def freeze_unused(net: VelocityNet, *inputs: object) -> list[str]:
    """Freeze the parameters on which net(*inputs) does not depend and return their names.

    Costs nothing on meta. An optimizer with a parameter that never gets a gradient keeps no state
    for it and cannot be restored, and a sharded reduction of it is wasted.
    """
    with torch.enable_grad():
        net(*inputs).float().sum().backward()
    unused = []
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
            unused.append(name)
        parameter.grad = None
    return unused


class RandomWeights:
    """Random initial values, each a function of (seed, name).

    rule(name, shape) returns ("normal", std) or ("constant", value). Aliases share another name's
    values.
    """

    def __init__(
        self,
        seed: int,
        rule: Callable[[str, torch.Size], tuple[str, float]],
        aliases: dict[str, str],
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

    Names missing in the files are looked up under their alias: a pretrained base has no second
    time embedder and starts with a copy of its first. names: of all the network's parameters;
    files with others are refused.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: dict[str, object],
        names: Collection[str],
        aliases: dict[str, str],
    ) -> None:
        inner = folder / "transformer"
        self.folder = inner if inner.is_dir() else folder
        self.aliases = aliases
        _check_config(self.folder, config)
        self.files = _weight_map(self.folder)
        if others := sorted(self.files.keys() - set(names)):
            raise UserError(
                f"init_from: {self.folder} has {len(others)} tensors that the model has no place "
                f"for: {listed(others)}; choose the matching model= and model.target_time="
            )

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) from disk; UserError if missing or of another shape."""
        if name not in self.files:
            name = _aliased(name, self.aliases)
        if name not in self.files:
            raise UserError(
                f"init_from: {self.folder} has no tensor {name!r}: other model or damaged folder"
            )
        with _opened(self.folder / self.files[name]) as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != tuple(shape):
                raise UserError(
                    f"init_from: {name} in {self.folder} has shape {tuple(stored.get_shape())}, "
                    f"the model wants {tuple(shape)}; choose the matching model="
                )
            rows: Tensor = stored[start:stop] if len(shape) else file.get_tensor(name)
            return rows


def _aliased(name: str, aliases: dict[str, str]) -> str:
    for prefix, other in aliases.items():
        if name.startswith(prefix):
            return other + name[len(prefix) :]
    return name


def _check_config(folder: Path, config: dict[str, object]) -> None:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"init_from: {folder} does not exist; give a diffusers folder or an export of a run"
        )
    if not path.is_file():
        raise UserError(
            f"init_from: {folder} has no config.json; give a diffusers folder or an export of a run"
        )
    stored = _json(path)
    for key, value in config.items():
        there = stored.get(key, value)
        if json.dumps(there) != json.dumps(value):
            raise UserError(
                f"init_from: {folder} is another model: its {key} is {there}, "
                f"the configuration's is {value}"
            )


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = _json(index)["weight_map"]
        return weight_map
    single = folder / f"{WEIGHTS}.safetensors"
    if not single.is_file():
        raise UserError(f"init_from: {folder} has no {single.name} and no {index.name}")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single.name)


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
