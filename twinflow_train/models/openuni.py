"""OpenUni: SANA behind a connector from a language model's states, as F(x_t, t, r, cond)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from twinflow_train.batch import Condition
from twinflow_train.models.base import VelocityNet, freeze_unused
from twinflow_train.models.initial import plain
from twinflow_train.models.joined import JoinedWeights, TorchWeights
from twinflow_train.models.sana import Sana
from twinflow_train.models.two_times import SecondEmbedder, pack_times, thousandths
from twinflow_train.models.weights import StoredWeights, Weights, save_folder, tensor_names

SANA = "transformer."
"""What the names of SANA's weights begin with in a checkpoint of all of OpenUni."""
NOT_TRAINED = ("lmm.", "vae.", "meta_queries")
"""What such a checkpoint may hold besides: the encoders, and the learned queries."""


@dataclass(kw_only=True)
class OpenUni(Sana):
    """OpenUni's connector, projector and SANA; the defaults are the released OpenUni-L-512.

    text_width: of the language model's states, and of the connector. caption_width: of what the
    projector makes of it for SANA.
    connector_layers, connector_heads, connector_hidden: layers of the connector, its attention
    heads, width inside its MLPs. freeze_connector: train SANA alone, as in the published runs.
    For the others see `Sana` and `Model`.

    Start from the released `.pth` file, or from an export, whose `transformer/` is a SANA of
    diffusers and whose `connector/` holds the rest.
    """

    second: ClassVar[SecondEmbedder] = SecondEmbedder(
        first=f"{SANA}time_embed", name=f"{SANA}time_embed_2", copied=False
    )

    text_width: int = 1536
    caption_width: int = 2304
    connector_layers: int = 6
    connector_heads: int = 24
    connector_hidden: int = 8960
    freeze_connector: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("caption_width", "connector_layers", "connector_heads", "connector_hidden"):
            value = self.__dict__[key]
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if self.text_width % self.connector_heads:
            raise ValueError(
                f"model.connector_heads = {self.connector_heads} must divide "
                f"model.text_width = {self.text_width}"
            )

    def stock_config(self) -> dict[str, object]:
        """Give SANA's configuration as its config.json has it, with `_class_name`."""
        return super().stock_config() | {"caption_channels": self.caption_width}

    def connector_config(self) -> dict[str, object]:
        """Give the configuration of connector and projector, as in their config.json."""
        return {
            "_class_name": "OpenUniConnector",
            "hidden_size": self.text_width,
            "intermediate_size": self.connector_hidden,
            "num_hidden_layers": self.connector_layers,
            "num_attention_heads": self.connector_heads,
            "caption_channels": self.caption_width,
        }

    def build(self) -> OpenUniNet:
        """Build the network on meta, with what is not trained frozen."""
        with torch.device("meta"):
            net = OpenUniNet(self)
            x, t = torch.zeros(1, self.channels, self.patch, 2 * self.patch), torch.zeros(1)
            freeze_unused(net, x, t, t, Condition(tokens=torch.zeros(1, 2, self.text_width)))
        if self.freeze_connector:
            net.stock.connector.requires_grad_(False)
            net.stock.projector.requires_grad_(False)
        return net

    def initial(self, name: str, shape: torch.Size) -> tuple[str, float]:
        """Start SANA as it starts alone, and the connector as its authors do."""
        if name.startswith(SANA):
            return super().initial(name.removeprefix(SANA), shape)
        return plain(name, shape)

    def stored_weights(self, folder: Path, *, seed: int = 0) -> Weights:
        """Open an export, or the released `.pth` file, or the folder in which it lies alone.

        UserError if it is of another model.

        seed: of a second time embedder that it lacks.
        """
        names, fresh = list(self.build().stored_names().values()), self.second.fresh(seed)
        beside = [] if (folder / "connector").is_dir() else sorted(folder.glob("*.pth"))
        if len(beside) == 1 or folder.is_file():
            file = beside[0] if beside else folder
            return TorchWeights(file, names=names, others=NOT_TRAINED, fresh=fresh)
        own = [name.removeprefix(SANA) for name in names if name.startswith(SANA)]
        sana = StoredWeights(
            folder / "transformer",
            config={"target_time": "embedder"} | self.config(),
            absent=self.absent,
            names=own,
            aliases={},
            fresh={key.removeprefix(SANA): weights for key, weights in fresh.items()},
        )
        connector = StoredWeights(
            folder / "connector",
            config=self.connector_config(),
            absent={},
            names=[name for name in names if not name.startswith(SANA)],
            aliases={},
            fresh={},
        )
        return JoinedWeights({SANA: sana, "": connector})

    def describes(self, folder: Path) -> bool:
        """Tell whether a folder is an export of this model: SANA's folder alone is not."""
        return (folder / "connector").is_dir() and super().describes(folder)

    def in_few_steps(self, folder: Path) -> bool:
        """Tell whether a folder's weights have a second time embedder, as few-step ones do."""
        name = self.second.name.removeprefix(SANA)
        inside = folder / "transformer"
        return inside.is_dir() and any(n.startswith(f"{name}.") for n in tensor_names(inside))

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write weights into `folder` as `stored_weights` reads them: SANA, and the connector."""
        for sana, some in groupby(tensors, key=lambda named: named[0].startswith(SANA)):
            if sana:
                own = ((name.removeprefix(SANA), tensor) for name, tensor in some)
                save_folder(folder / "transformer", self.config(), own)
            else:
                save_folder(folder / "connector", self.connector_config(), some)


class Connected(nn.Module):
    """The stock parts one behind another: a bidirectional encoder, a linear layer, and SANA."""

    def __init__(self, size: OpenUni) -> None:
        # Heavy, and the owners of the libraries: imported only where a network is built.
        from diffusers import SanaTransformer2DModel
        from transformers import SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        super().__init__()
        self.transformer = SanaTransformer2DModel(**size.stock_arguments())
        # The released connector is SigLIP's encoder, without what stands before and behind it.
        self.connector = SiglipEncoder(
            SiglipVisionConfig(
                hidden_size=size.text_width,
                intermediate_size=size.connector_hidden,
                num_hidden_layers=size.connector_layers,
                num_attention_heads=size.connector_heads,
                attn_implementation="sdpa",
            )
        )
        self.projector = nn.Linear(size.text_width, size.caption_width)

    def captions(
        self, states: Float[Tensor, "b n width"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n captions"]:
        """Turn the language model's states into what SANA takes for a caption's."""
        seen = None if mask is None else mask[:, None, None, :]
        connected: Tensor = self.connector(states, seen).last_hidden_state
        captions: Tensor = self.projector(connected)
        return captions


class OpenUniNet(VelocityNet):
    """The stock parts behind our one convention: dx/dt, float32 times, 1 = noise."""

    def __init__(self, size: OpenUni) -> None:
        super().__init__(
            Connected(size), second=size.second, target_time=size.target_time, clock=thousandths
        )

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        cond: Condition,
    ) -> Float[Tensor, "b c h w"]:
        """Predict dx/dt; SANA's own time runs the same way, from 0 to 1000."""
        dtype = self.stock.projector.weight.dtype
        velocity: Tensor = self.stock.transformer(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=self.stock.captions(cond.tokens.to(dtype), cond.mask),
            encoder_attention_mask=cond.mask,
            timestep=pack_times(t, r),
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The connector's layers and SANA's blocks."""
        return [*self.stock.connector.layers, *self.stock.transformer.transformer_blocks]

    def recompute(self, call: Callable[..., object]) -> None:
        """Run each block in training as call(block, *inputs) instead of block(*inputs)."""

        def learning(block: Callable[..., object], *inputs: Any) -> object:
            # The connector's layers ask in every pass, SANA's blocks only where a gradient is kept.
            return call(block, *inputs) if torch.is_grad_enabled() else block(*inputs)

        self.stock.transformer.enable_gradient_checkpointing(call)
        for layer in self.stock.connector.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = learning

    def rebuild_constants(self) -> None:
        """There are none."""
