"""Stable Diffusion 3.5: the transformer of its Medium size, or of any, as F(x_t, t, r, cond)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinflow_train.batch import Condition
from twinflow_train.errors import UserError
from twinflow_train.models.base import Model, VelocityNet, freeze_unused
from twinflow_train.models.initial import plain
from twinflow_train.models.two_times import SecondEmbedder, pack_times, thousandths
from twinflow_train.models.weights import Weights

POSITIONS = "pos_embed.pos_embed"
"""The position table's name in weight files."""
SAMPLE_SIZE = 128
"""Side of the latents for which random weights space their positions; released weights have
theirs."""


@dataclass(kw_only=True)
class SD3(Model):
    """Stable Diffusion 3.5's transformer; the defaults are the released Medium network.

    layers, heads, head_dim: transformer blocks, attention heads, width of a head.
    dual: how many blocks, from the first on, have a second attention among image tokens.
    pooled_width: width of the pooled text embeddings.
    positions: side of the position table, in tokens: the most that an image may have.
    For the others see `Model`.

    The position table is data that weight files hold: it is a frozen parameter here, sharded, saved
    and exported like any other. It lacks the files' first axis, of one, along which nothing could
    be cut.
    """

    # It also takes the pooled text, and so does the second, by weights of its own.
    second: ClassVar[SecondEmbedder] = SecondEmbedder(
        first="time_text_embed", name="time_text_embed_2", copied=False
    )
    # Attention of both streams, as in the stock training scripts; not that among images alone.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    layers: int = 24
    heads: int = 24
    head_dim: int = 64
    dual: int = 13
    text_width: int = 4096
    pooled_width: int = 2048
    channels: int = 16
    patch: int = 2
    positions: int = 384

    def __post_init__(self) -> None:
        sizes = ("layers", "heads", "head_dim", "text_width", "channels", "patch")
        for key in (*sizes, "pooled_width", "positions"):
            value = self.__dict__[key]
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if not 0 <= self.dual <= self.layers:
            raise ValueError(f"model.dual must be in 0..model.layers = {self.layers}: {self.dual}")
        if self.width % 4:
            raise ValueError(
                "the network's width, model.heads * model.head_dim, must divide by 4 for its "
                f"positions, got {self.width}"
            )

    @property
    def width(self) -> int:
        """The network's width."""
        return self.heads * self.head_dim

    def stock_config(self) -> dict[str, object]:
        """Give the stock class's configuration as its config.json has it, with `_class_name`."""
        return {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": SAMPLE_SIZE,
            "patch_size": self.patch,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_layers": self.layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_width,
            "caption_projection_dim": self.width,
            "pooled_projection_dim": self.pooled_width,
            "pos_embed_max_size": self.positions,
            "dual_attention_layers": list(range(self.dual)),
            "qk_norm": "rms_norm",
        }

    def build(self) -> SD3Net:
        """Build the network on meta, with parameters that no output depends on frozen."""
        with torch.device("meta"):
            net = SD3Net(self)
            x, t = torch.zeros(1, self.channels, self.patch, self.patch), torch.zeros(1)
            cond = Condition(
                tokens=torch.zeros(1, 2, self.text_width), pooled=torch.zeros(1, self.pooled_width)
            )
            freeze_unused(net, x, t, t, cond)
        return net

    def initial(self, name: str, shape: torch.Size) -> tuple[str, float]:
        """Start as diffusion transformers do: modulations and output are zero."""
        if name.startswith(("norm_out.", "proj_out.")) or ".norm1" in name:
            return "constant", 0.0
        return plain(name, shape)

    def random_weights(self, seed: int) -> Weights:
        """Give random initial weights, each a function of (seed, name), and sine positions."""
        return _WithPositions(super().random_weights(seed), self)

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write weights into `folder` as `stored_weights` and the stock class read them."""
        super().save(
            folder, ((name, one[None] if name == POSITIONS else one) for name, one in tensors)
        )

    def check(
        self, latent: Sequence[int], text_width: int, *, pooled_width: int = 0, references: int = 0
    ) -> None:
        """Refuse data that does not fit: UserError with both numbers (see `Model`)."""
        super().check(latent, text_width, pooled_width=pooled_width, references=references)
        most = self.positions * self.patch
        if max(latent[1:]) > most:
            raise UserError(
                f"latents of {latent[1]}x{latent[2]} are larger than the position table of "
                f"model.positions = {self.positions} tokens a side: at most {most}x{most}"
            )

    def check_extras(self, *, pooled_width: int, references: int) -> None:
        """Refuse pooled embeddings of another width, or none, and reference images: UserError."""
        if pooled_width != self.pooled_width:
            raise UserError(
                f"model.pooled_width is {self.pooled_width}, the data's pooled embeddings have "
                f"width {pooled_width} (0 is none): prepare the data with this family's encoders="
            )
        super().check_extras(pooled_width=0, references=references)


class SD3Net(VelocityNet):
    """The stock transformer behind our one convention: dx/dt, float32 times, 1 = noise."""

    def __init__(self, size: SD3) -> None:
        # Heavy, and the owner of the library: imported only where a network is built.
        from diffusers import SD3Transformer2DModel

        super().__init__(
            SD3Transformer2DModel(**size.stock_arguments()),
            second=size.second,
            target_time=size.target_time,
            clock=thousandths,
        )
        embed = self.stock.pos_embed
        table = embed.pos_embed
        del embed.pos_embed
        embed.pos_embed = nn.Parameter(table.squeeze(0), requires_grad=False)

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        cond: Condition,
    ) -> Float[Tensor, "b c h w"]:
        """Predict dx/dt; its own time runs the same way, from 0 to 1000.

        Raises:
            UserError: texts are padded, which its attention cannot tell, or have no pooled
                embedding.
        """
        if cond.mask is not None or cond.pooled is None:
            raise UserError(
                "Stable Diffusion 3.5 takes texts that all have the same number of tokens, each "
                "with a pooled embedding, as encoders=sd35_medium makes them: prepare the data anew"
            )
        dtype = self.stock.proj_out.weight.dtype
        velocity: Tensor = self.stock(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=cond.tokens.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            timestep=pack_times(t, r),
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The dual-stream blocks."""
        return list(self.stock.transformer_blocks)

    def rebuild_constants(self) -> None:
        """There are none."""


class _WithPositions:
    """Random weights, but for the position table."""

    def __init__(self, weights: Weights, size: SD3) -> None:
        self._weights, self._size = weights, size

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a named tensor along its first axis."""
        if name != POSITIONS:
            return self._weights.read(name, shape, start, stop)
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        size = self._size
        table: Tensor = get_2d_sincos_pos_embed(
            size.width, size.positions, base_size=SAMPLE_SIZE // size.patch, output_type="pt"
        )
        return table.float()[start:stop]
