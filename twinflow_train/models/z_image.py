"""Z-Image and its Turbo: the 6B transformer, or the same class at any size, as F(x_t, t, r, cond).

Z-Image's own clock runs from noise to data and its output from data to noise: model time is 1 - t,
and F is minus what the network says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinflow_train.batch import Condition
from twinflow_train.errors import UserError
from twinflow_train.models.base import Model, VelocityNet, freeze_unused
from twinflow_train.models.initial import plain
from twinflow_train.models.two_times import SecondEmbedder, TargetTime, pack_times, unpack_times
from twinflow_train.models.weights import StoredWeights, Weights

LONGEST_SIDE = 512
"""Image tokens along each side for which the stock class has rotary positions."""


class Convention(Enum):
    """What the two times mean to the network.

    ours: as in all families, (t, r) in [-1, 1] with fake times of their own.
    released: as in the TwinFlow-Z-Image weights that its authors published, which do not tell fake
    times from real ones: for sampling with them, and for nothing else.
    """

    ours = "ours"
    released = "released"


@dataclass(kw_only=True)
class ZImage(Model):
    """Z-Image's transformer; the defaults are the released 6.15B network, also of its Turbo.

    layers, refiner_layers: blocks over text and image together; before them, over each alone.
    heads, head_dim: attention heads, width of a head.
    rope: rotary dimensions for sequence, height and width; they sum to head_dim.
    convention: what times mean to the network. For the others see `Model`.
    """

    second: ClassVar[SecondEmbedder] = SecondEmbedder(
        first="t_embedder", name="t_embedder_2", copied=True
    )
    # All of attention, as in the stock training scripts.
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    layers: int = 30
    refiner_layers: int = 2
    heads: int = 30
    head_dim: int = 128
    text_width: int = 2560
    channels: int = 16
    patch: int = 2
    rope: list[int] = field(default_factory=lambda: [32, 48, 48])
    convention: Convention = Convention.ours

    def __post_init__(self) -> None:
        sizes = ("layers", "refiner_layers", "heads", "head_dim", "text_width", "channels", "patch")
        for key in sizes:
            value = self.__dict__[key]
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if len(self.rope) != 3 or sum(self.rope) != self.head_dim or any(d % 2 for d in self.rope):
            raise ValueError(
                f"model.rope must be three even numbers that sum to "
                f"model.head_dim = {self.head_dim}, got {list(self.rope)}"
            )
        if self.convention is Convention.released and self.target_time is not TargetTime.embedder:
            raise ValueError(
                "model.convention=released has a second embedder: leave model.target_time out"
            )

    def stock_config(self) -> dict[str, object]:
        """Give the stock class's configuration as its config.json has it, with `_class_name`.

        How long its rotary tables are is left out: it changes no number. The class is left out
        with the released convention: those weights were saved by a class of their authors'.
        """
        ours = self.convention is Convention.ours
        return ({"_class_name": "ZImageTransformer2DModel"} if ours else {}) | {
            "all_patch_size": [self.patch],
            "all_f_patch_size": [1],
            "in_channels": self.channels,
            "dim": self.heads * self.head_dim,
            "n_layers": self.layers,
            "n_refiner_layers": self.refiner_layers,
            "n_heads": self.heads,
            "n_kv_heads": self.heads,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": self.text_width,
            "siglip_feat_dim": None,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": list(self.rope),
        }

    def build(self) -> ZImageNet:
        """Build the network on meta, with parameters that no output depends on frozen."""
        with torch.device("meta"):
            net = ZImageNet(self)
            x, t = torch.zeros(1, self.channels, self.patch, self.patch), torch.zeros(1)
            freeze_unused(net, x, t, t, Condition(tokens=torch.zeros(1, 2, self.text_width)))
        net.rebuild_constants()
        return net

    def initial(self, name: str, shape: torch.Size) -> tuple[str, float]:
        """Start as diffusion transformers do: modulations and output are zero."""
        if ".adaLN_modulation." in name or ".linear." in name:
            return "constant", 0.0
        if name.endswith("pad_token"):
            return "normal", 0.02
        return plain(name, shape)

    def check(
        self, latent: Sequence[int], text_width: int, *, pooled_width: int = 0, references: int = 0
    ) -> None:
        """Refuse data that does not fit: UserError with both numbers (see `Model`)."""
        super().check(latent, text_width, pooled_width=pooled_width, references=references)
        most = LONGEST_SIDE * self.patch
        if max(latent[1:]) > most:
            raise UserError(
                f"latents of {latent[1]}x{latent[2]} are larger than Z-Image has positions for: "
                f"at most {most}x{most}"
            )

    @property
    def untrainable(self) -> str:
        """Say why the network is for sampling only; empty if it can be trained."""
        if self.convention is Convention.ours:
            return ""
        return (
            "model.convention=released is for sampling with published weights, in which fake and "
            "real times are the same: to train leave it out, and start from Z-Image or its Turbo"
        )

    def describes(self, folder: Path) -> bool:
        """Tell whether a diffusers folder is of this model, and of its convention.

        Folders with a second embedder that are no exports of ours hold the published weights.
        """
        published = self.convention is Convention.released
        return super().describes(folder) and self.in_few_steps(folder) == published

    def stored_weights(self, folder: Path, *, seed: int = 0) -> Weights:
        """Open a diffusers folder (see `Model`); with the released convention, of such weights."""
        weights = super().stored_weights(folder, seed=seed)
        if self.convention is Convention.released:
            assert isinstance(weights, StoredWeights)
            if not any(name.startswith(f"{self.second.name}.") for name in weights.files):
                raise UserError(
                    f"init_from: {folder} has no {self.second.name}, so it holds no published "
                    "TwinFlow weights: leave model.convention=released out"
                )
        return weights


class ZImageNet(VelocityNet):
    """The stock transformer behind our one convention: dx/dt, float32 times, 1 = noise."""

    def __init__(self, size: ZImage) -> None:
        # Heavy, and the owner of the library: imported only where a network is built.
        from diffusers import ZImageTransformer2DModel

        super().__init__(
            ZImageTransformer2DModel(**size.stock_arguments()),
            second=size.second,
            target_time=size.target_time,
            clock=_reversed_thousandths,
        )
        if size.convention is Convention.released:
            self.stock.t_embedder = ReleasedTimes(
                self.stock.t_embedder.embed, self.stock.t_embedder.embed_r
            )
        # The stock class would scale the packed times, in which no digit can be spared.
        self.stock.t_scale = 1.0
        self.patch = size.patch

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        cond: Condition,
    ) -> Float[Tensor, "b c h w"]:
        """Predict dx/dt, minus what the network says at model time 1 - t.

        The signed t: fake times are beyond 1 there and meet the real ones only at t = 0.
        """
        dtype = self.stock.x_pad_token.dtype
        velocities = self.stock(
            list(x_t.to(dtype).unsqueeze(2).unbind()),
            pack_times(t, r),
            unpadded(cond, dtype),
            patch_size=self.patch,
            return_dict=False,
        )[0]
        return -torch.stack(velocities).squeeze(2).to(x_t.dtype)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks over the image alone, the text alone, and both, in the order they run."""
        stock = self.stock
        return [*stock.noise_refiner, *stock.context_refiner, *stock.layers]

    def rebuild_constants(self) -> None:
        """Forget the rotary tables; they are computed at the first call, where it takes place."""
        self.stock.rope_embedder.freqs_cis = None


def unpadded(cond: Condition, dtype: torch.dtype) -> list[Float[Tensor, "_ width"]]:
    """Return each row's text embedding without its padding."""
    tokens = cond.tokens.to(dtype)
    if cond.mask is None:
        return list(tokens.unbind())
    lengths: list[int] = cond.mask.sum(1).tolist()
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


def _reversed_thousandths(t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    return (1 - t) * 1000


class ReleasedTimes(nn.Module):
    """embed(|s|) + |s - q| embed_r(q - s) of the times s and q that t and r are turned into.

    s = sign(t) (1 - |t|), in thousandths, as in the published code; so also a time of exactly 0
    becomes 0 and not 1, and -t looks like t.
    """

    def __init__(self, embed: nn.Module, embed_r: nn.Module) -> None:
        super().__init__()
        self.embed, self.embed_r = embed, embed_r

    def forward(self, times: Float[Tensor, "b 6"]) -> Float[Tensor, "b width"]:
        """Embed packed times."""
        own, target = (
            time.sign() * (1 - time.abs()) for time in map(torch.Tensor.double, unpack_times(times))
        )
        at_own: Tensor = self.embed(1000 * own.abs())
        between: Tensor = self.embed_r(1000 * target - 1000 * own)
        return at_own + (own - target).abs()[:, None].to(between.dtype) * between
