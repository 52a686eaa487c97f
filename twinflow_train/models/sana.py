"""SANA: linear attention over 32-fold compressed latents, as F(x_t, t, r, cond)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinflow_train.batch import Condition
from twinflow_train.models.base import Model, VelocityNet, freeze_unused
from twinflow_train.models.initial import plain
from twinflow_train.models.two_times import SecondEmbedder, pack_times, thousandths


@dataclass(kw_only=True)
class Sana(Model):
    """SANA's transformer; the defaults are the released 1.6B network.

    layers, heads, head_dim: transformer blocks, heads of linear attention, width of a head.
    cross_heads: heads of attention to the text, which share the network's width.
    feed_forward: width of the convolutions inside a block, relative to the network's.
    For the others see `Model`. There is no position table, so latents may have any size.
    """

    # It gives the blocks' modulation and the embedding itself; each gets its own second part.
    second: ClassVar[SecondEmbedder] = SecondEmbedder(
        first="time_embed", name="time_embed_2", copied=False
    )
    # All of attention, as in the stock training scripts, and where its result goes.
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    layers: int = 20
    heads: int = 70
    head_dim: int = 32
    cross_heads: int = 20
    feed_forward: float = 2.5
    text_width: int = 2304
    channels: int = 32
    patch: int = 1

    def __post_init__(self) -> None:
        keys = ("layers", "heads", "head_dim", "cross_heads", "text_width", "channels", "patch")
        for key in keys:
            value = self.__dict__[key]
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if self.width % self.cross_heads:
            raise ValueError(
                f"model.cross_heads = {self.cross_heads} must divide the network's width, "
                f"model.heads * model.head_dim = {self.width}"
            )
        if self.feed_forward <= 0:
            raise ValueError(f"model.feed_forward must be positive, got {self.feed_forward}")

    @property
    def width(self) -> int:
        """The network's width."""
        return self.heads * self.head_dim

    def stock_config(self) -> dict[str, object]:
        """Give the stock class's configuration as its config.json has it, with `_class_name`."""
        return {
            "_class_name": "SanaTransformer2DModel",
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.layers,
            "num_cross_attention_heads": self.cross_heads,
            "cross_attention_head_dim": self.width // self.cross_heads,
            "cross_attention_dim": self.width,
            "caption_channels": self.text_width,
            "mlp_ratio": self.feed_forward,
            "attention_bias": False,
            "patch_size": self.patch,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "interpolation_scale": None,
            "guidance_embeds": False,
            "qk_norm": None,
            "timestep_scale": 1.0,
        }

    def build(self) -> VelocityNet:
        """Build the network on meta, with parameters that no output depends on frozen."""
        with torch.device("meta"):
            net = SanaNet(self)
            x, t = torch.zeros(1, self.channels, self.patch, 2 * self.patch), torch.zeros(1)
            freeze_unused(net, x, t, t, Condition(tokens=torch.zeros(1, 2, self.text_width)))
        return net

    def initial(self, name: str, shape: torch.Size) -> tuple[str, float]:
        """Start with modulations that depend on no time, and an output of zero."""
        if name.startswith(("time_embed.linear.", "proj_out.")):
            return "constant", 0.0
        if name.endswith("scale_shift_table"):
            return "normal", self.width**-0.5
        return plain(name, shape)


class SanaNet(VelocityNet):
    """The stock transformer behind our one convention: dx/dt, float32 times, 1 = noise."""

    def __init__(self, size: Sana) -> None:
        # Heavy, and the owner of the library: imported only where a network is built.
        from diffusers import SanaTransformer2DModel

        super().__init__(
            SanaTransformer2DModel(**size.stock_arguments()),
            second=size.second,
            target_time=size.target_time,
            clock=thousandths,
        )

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        cond: Condition,
    ) -> Float[Tensor, "b c h w"]:
        """Predict dx/dt; SANA's own time runs the same way, from 0 to 1000."""
        dtype = self.stock.proj_out.weight.dtype
        velocity: Tensor = self.stock(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=cond.tokens.to(dtype),
            encoder_attention_mask=cond.mask,
            timestep=pack_times(t, r),
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of linear attention, attention to the text, and convolutions."""
        return list(self.stock.transformer_blocks)

    def rebuild_constants(self) -> None:
        """There are none."""


def sana_600m() -> Sana:
    """Give the released network of 0.6B parameters."""
    return Sana(layers=28, heads=36, head_dim=32, cross_heads=16)
