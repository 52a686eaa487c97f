"""What every model family provides: a network around a stock transformer, and its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinflow_train.batch import Condition, Velocity
from twinflow_train.errors import UserError
from twinflow_train.models.hub import read_index
from twinflow_train.models.two_times import (
    Clock,
    SecondEmbedder,
    ShiftedTime,
    TargetTime,
    TwoTimes,
    own_time,
)
from twinflow_train.models.weights import (
    RandomWeights,
    StoredWeights,
    Weights,
    differences,
    read_config,
    save_folder,
    tensor_names,
)

OWN_KEYS = ("_class_name", "target_time")
"""Keys of a configuration that the stock class does not take."""


class VelocityNet(nn.Module, ABC):
    """F(x_t, t, r, cond) over a stock diffusers transformer, held as `stock`.

    Its time embedder is swapped for one that takes two times; nothing else of it is touched.
    """

    def __init__(
        self,
        stock: nn.Module,
        *,
        second: SecondEmbedder,
        target_time: TargetTime,
        clock: Clock = own_time,
    ) -> None:
        super().__init__()
        self.stock: Any = stock
        self.second, self.target_time = second, target_time
        first = stock.get_submodule(second.first)
        two = ShiftedTime if target_time.shifts else TwoTimes
        stock.set_submodule(second.first, two(first, clock=clock), strict=True)

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

    def keep_own_clock(self) -> None:
        """Be asked on the diagonal only, as the stock network is: for a frozen teacher."""
        if self.target_time is TargetTime.shift:
            self.stock.get_submodule(self.second.first).own_clock = True

    def recompute(self, call: Callable[..., object]) -> None:
        """Run each block in training as call(block, *inputs) instead of block(*inputs).

        By the stock class's own switch for gradient checkpointing.
        """
        self.stock.enable_gradient_checkpointing(partial(call))

    def stored_names(self) -> dict[str, str]:
        """Map each parameter's name to its name in weight files: the released weights' names."""
        return {name: self.stored_name(name) for name, _ in self.named_parameters()}

    def stored_name(self, name: str) -> str:
        """Name one parameter as weight files do."""
        name, first = name.removeprefix("stock."), self.second.first
        name = name.replace(f"{first}.embed_r.", f"{self.second.name}.")
        return name.replace(f"{first}.embed.", f"{first}.")


@dataclass(kw_only=True)
class Model(ABC):
    """A model family at a size: the `model` group of the configuration.

    channels: of a latent; patch: side of the square of latents that becomes one token.
    text_width: width of the text embeddings.
    target_time: how the target time enters.
    second: the family's second time embedder. absent: what a config.json that is older than a key
    means by not having it. lora_targets: stock linear layers that a LoRA adapts if the
    configuration names none, by the ends of their names; empty where there is no LoRA. pipelines:
    stock pipelines of the family, where a transformer's config.json does not tell it from another.
    """

    second: ClassVar[SecondEmbedder]
    absent: ClassVar[Mapping[str, object]] = {}
    lora_targets: ClassVar[tuple[str, ...]] = ()
    pipelines: ClassVar[tuple[str, ...]] = ()

    channels: int
    patch: int
    text_width: int
    target_time: TargetTime = TargetTime.embedder

    @abstractmethod
    def build(self) -> VelocityNet:
        """Build the network on meta, with parameters that no output depends on frozen."""

    @abstractmethod
    def stock_config(self) -> dict[str, object]:
        """Give the stock class's configuration as its config.json has it, with `_class_name`."""

    @abstractmethod
    def initial(self, name: str, shape: torch.Size) -> tuple[str, float]:
        """Choose a parameter's random initial values by its stored name (see `RandomWeights`)."""

    def config(self) -> dict[str, object]:
        """Give the stock class's configuration, as in its config.json, and whether times shift."""
        shifted: dict[str, object] = {"target_time": "shift"} if self.target_time.shifts else {}
        return shifted | self.stock_config()

    def stock_arguments(self) -> dict[str, Any]:
        """Give what the stock class is constructed with."""
        return {key: value for key, value in self.config().items() if key not in OWN_KEYS}

    def random_weights(self, seed: int) -> Weights:
        """Give random initial weights, each a function of (seed, name)."""
        fresh = self.second.fresh(seed)

        def rule(name: str, shape: torch.Size) -> tuple[str, float]:
            for prefix, weights in fresh.items():
                if name.startswith(prefix):
                    return weights.rule(name, shape)
            return self.initial(name, shape)

        return RandomWeights(seed, rule, self.second.aliases())

    def stored_weights(self, folder: Path, *, seed: int = 0) -> Weights:
        """Open a diffusers folder; UserError if it is missing or of another model.

        seed: of a second time embedder that it lacks and that does not start as a copy.
        """
        return StoredWeights(
            folder,
            config={"target_time": "embedder"} | self.config(),
            absent=self.absent,
            names=self.build().stored_names().values(),
            aliases=self.second.aliases(),
            fresh=self.second.fresh(seed),
        )

    def describes(self, folder: Path) -> bool:
        """Tell whether a diffusers folder is of this model, by what it says and not its weights."""
        kind = read_index(folder).get("_class_name")
        if self.pipelines and kind is not None and kind not in self.pipelines:
            return False
        said = read_config(folder)
        wanted = {"target_time": "embedder"} | self.config()
        return bool(said) and not list(differences(said, wanted, self.absent))

    def in_few_steps(self, folder: Path) -> bool:
        """Tell whether a folder's weights have a second time embedder, as few-step ones do."""
        return any(name.startswith(f"{self.second.name}.") for name in tensor_names(folder))

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write weights into `folder` as `stored_weights` reads them: a diffusers folder.

        tensors: (stored name, whole tensor).
        """
        save_folder(folder / "transformer", self.config(), tensors)

    def pretrained(self, velocity: Velocity) -> Velocity:
        """Ask a network as the stock one is asked, at t alone: before training, the base model.

        Where times are shifted by r / 2 that is with r = 0.
        """

        def own_clock(
            x_t: Tensor, t: Float[Tensor, " b"], r: Float[Tensor, " b"], cond: Condition, /
        ) -> Tensor:
            return velocity(x_t, t, 0 * r, cond)

        return own_clock if self.target_time.shifts else velocity

    def check(
        self, latent: Sequence[int], text_width: int, *, pooled_width: int = 0, references: int = 0
    ) -> None:
        """Refuse data that does not fit: UserError with both numbers.

        latent: shape (C, H, W). pooled_width: of pooled text embeddings, 0 if there are none.
        references: reference images a sample.
        """
        channels, height, width = latent
        if channels != self.channels:
            raise UserError(f"model.channels is {self.channels}, the data has {channels} channels")
        if height % self.patch or width % self.patch:
            raise UserError(
                f"latents of {height}x{width} do not divide by model.patch = {self.patch}"
            )
        if text_width != self.text_width:
            raise UserError(
                f"model.text_width is {self.text_width}, the data's text has width {text_width}"
            )
        self.check_extras(pooled_width=pooled_width, references=references)

    @property
    def untrainable(self) -> str:
        """Say why the network is for sampling only; empty if it can be trained."""
        return ""

    def check_extras(self, *, pooled_width: int, references: int) -> None:
        """Refuse what this family has no use for, or wants and does not get: UserError."""
        if pooled_width:
            raise UserError(
                f"the data has pooled embeddings of width {pooled_width}, and this model takes "
                "none: choose the model= that the data was prepared for"
            )
        if references:
            raise UserError(
                f"the data has {references} reference images a sample, and this model takes none: "
                "choose the model= that the data was prepared for"
            )


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
