"""Qwen-Image and its edit models: the 20B transformer, or the same class at any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Condition
from twinflow_train.models.attention import JointAttention
from twinflow_train.models.base import Model, VelocityNet, freeze_unused
from twinflow_train.models.two_times import SecondEmbedder, pack_times


@dataclass(kw_only=True)
class QwenImage(Model):
    """Qwen-Image's transformer; the defaults are the released 20.4B network.

    layers, heads, head_dim: transformer blocks, attention heads, width of a head.
    rope: rotary dimensions for frame, height and width; they sum to head_dim.
    For the others see `Model`.
    """

    second: ClassVar[SecondEmbedder] = SecondEmbedder(
        first="time_text_embed", name="time_text_embed_2", copied=True
    )
    absent: ClassVar[Mapping[str, object]] = {
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }
    # All of attention and both streams' MLPs. The modulations, a third of the network, see nothing
    # but the time.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2"),
        *("txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)

    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    text_width: int = 3584
    channels: int = 16
    patch: int = 2
    rope: list[int] = field(default_factory=lambda: [16, 56, 56])

    def __post_init__(self) -> None:
        for key in ("layers", "heads", "head_dim", "text_width", "channels", "patch"):
            value = self.__dict__[key]
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if len(self.rope) != 3 or sum(self.rope) != self.head_dim or any(d % 2 for d in self.rope):
            raise ValueError(
                f"model.rope must be three even numbers that sum to "
                f"model.head_dim = {self.head_dim}, got {list(self.rope)}"
            )

    def stock_config(self) -> dict[str, object]:
        """Give the stock class's configuration as its config.json has it, with `_class_name`."""
        return {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": self.patch,
            "in_channels": self.channels * self.patch**2,
            "out_channels": self.channels,
            "num_layers": self.layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_width,
            "axes_dims_rope": list(self.rope),
            "guidance_embeds": False,
            "zero_cond_t": False,
            "use_additional_t_cond": False,
            "use_layer3d_rope": False,
        }

    def build(self) -> QwenImageNet:
        """Build the network on meta, with parameters that no output depends on frozen."""
        with torch.device("meta"):
            net = QwenImageNet(self)
            side = 2 * self.patch
            x, t = torch.zeros(1, self.channels, side, side), torch.zeros(1)
            freeze_unused(net, x, t, t, Condition(tokens=torch.zeros(1, 2, self.text_width)))
        net.rebuild_constants()
        return net

    def initial(self, name: str, shape: torch.Size) -> tuple[str, float]:
        """Start as diffusion transformers do: modulations and output are zero."""
        if "_mod." in name or name.startswith(("norm_out.", "proj_out.")):
            return "constant", 0.0
        if len(shape) == 1:
            return "constant", 0.0 if name.endswith("bias") else 1.0
        return "normal", (2 / (shape[0] + shape[1])) ** 0.5


class QwenImageNet(VelocityNet):
    """The stock transformer behind our one convention: dx/dt, float32 times, 1 = noise."""

    def __init__(self, size: QwenImage) -> None:
        # Heavy, and the owner of the library: imported only where a network is built.
        from diffusers import QwenImageTransformer2DModel

        super().__init__(
            QwenImageTransformer2DModel(**size.stock_arguments()),
            second=size.second,
            target_time=size.target_time,
        )
        self.patch = size.patch
        for block in self.blocks:
            block.attn.set_processor(JointAttention())

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        cond: Condition,
    ) -> Float[Tensor, "b c h w"]:
        """Predict dx/dt; Qwen-Image's own time runs the same way: nothing is flipped or scaled.

        Reference images stand behind the noisy one, as its next frames, clean.
        """
        dtype = self.stock.img_in.weight.dtype
        pictures = (x_t, *cond.references)
        shapes = [(1, p.shape[-2] // self.patch, p.shape[-1] // self.patch) for p in pictures]
        _, height, width = shapes[0]
        packed = [pack(picture, self.patch).to(dtype) for picture in pictures]
        tokens = self.stock(
            hidden_states=torch.cat(packed, dim=1),
            encoder_hidden_states=cond.tokens.to(dtype),
            attention_kwargs=None if cond.mask is None else {"texts": cond.mask},
            timestep=pack_times(t, r),
            img_shapes=[shapes] * len(x_t),
            return_dict=False,
        )[0]
        own = tokens[:, : height * width]
        return unpack(own, self.patch, height, width).to(x_t.dtype)

    @property
    def blocks(self) -> Sequence[Any]:
        """The dual-stream blocks."""
        return list(self.stock.transformer_blocks)

    def rebuild_constants(self) -> None:
        """Compute the rotary tables, which are plain attributes and stay on meta otherwise."""
        rope = self.stock.pos_embed
        self.stock.pos_embed = type(rope)(rope.theta, axes_dim=rope.axes_dim, scale_rope=True)


def pack(x: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b tokens width"]:
    """Cut latents into tokens of patch x patch latents, channel-major as Qwen-Image's pipeline."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpack(
    tokens: Float[Tensor, "b tokens width"], patch: int, height: int, width: int
) -> Float[Tensor, "b c h w"]:
    """Undo `pack` for a picture of height x width tokens."""
    b, _, size = tokens.shape
    c = size // patch**2
    x = tokens.reshape(b, height, width, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, height * patch, width * patch).contiguous()
