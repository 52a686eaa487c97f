"""Every model family at a small size, beside the stock class as its own pipeline calls it.

To add one: a `Family` in FAMILIES. `tests/models/test_families.py` then holds it to all that is
promised of every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from twinflow_train.batch import Condition
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.qwen_image_edit import QwenImageEdit
from twinflow_train.models.sana import Sana, sana_600m
from twinflow_train.models.sd3 import SD3
from twinflow_train.models.weights import Weights
from twinflow_train.models.z_image import ZImage

HEIGHT, WIDTH = 4, 6
Ask = Callable[[Any, Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True, kw_only=True)
class Released:
    """A released network: parameters of the stock class, of what we add, and of its first block.

    What the stock class holds as a buffer and we as a parameter is counted with the stock class.
    """

    model: Model
    stock: int
    second: int
    block: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    small: at a size for tests. stock: the class in diffusers. ask(stock, x, t, cond): dx/dt as the
    stock pipeline has it of that class, t being sigma. released: its networks. frozen: ends of the
    names of parameters that get no gradient. pads: whether texts may be padded. references: images
    that a text is about. scheduler: another one of its pipeline, besides Euler's.
    """

    small: Model
    stock: type[Any]
    ask: Ask
    released: tuple[Released, ...]
    pads: bool = True
    references: int = 0
    frozen: tuple[str, ...] = ()
    scheduler: Any = field(default_factory=FlowMatchEulerDiscreteScheduler)

    @property
    def pooled_width(self) -> int:
        """The width of pooled embeddings, 0 where there are none."""
        return self.small.pooled_width if isinstance(self.small, SD3) else 0

    def texts(self, *lengths: int, seed: int = 0) -> Condition:
        """Draw text embeddings; where texts are not padded, all of the longest length."""
        draws = torch.Generator().manual_seed(seed)
        if not self.pads:
            lengths = (max(lengths),) * len(lengths)
        width = self.small.text_width
        found = Condition.pad([torch.randn(n, width, generator=draws) for n in lengths])
        if self.pooled_width:
            found.pooled = torch.randn(len(lengths), self.pooled_width, generator=draws)
        shape = (len(lengths), self.small.channels, HEIGHT, WIDTH)
        beside = (torch.randn(shape, generator=draws) for _ in range(self.references))
        return replace(found, references=tuple(beside))

    def latents(self, rows: int, seed: int = 0) -> Tensor:
        """Draw latents whose height and width differ."""
        draws = torch.Generator().manual_seed(seed)
        return torch.randn(rows, self.small.channels, HEIGHT, WIDTH, generator=draws)

    def stock_model(self, **changes: Any) -> Any:
        """Build the stock class with random values, biases, norms and paddings moved too."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            stock = self.stock(**(self.small.stock_arguments() | changes))
            with torch.no_grad():
                for parameter in stock.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return stock.eval()

    @cached_property
    def folder(self) -> Path:
        """Save the stock model as its own class does, once."""
        folder = Path(self._scratch.name)
        self.stock_model().save_pretrained(folder)
        return folder

    @cached_property
    def _scratch(self) -> TemporaryDirectory[str]:
        """Hold a folder that is gone with this process."""
        return TemporaryDirectory(prefix="stock-")

    def net(self) -> VelocityNet:
        """Fill our network with the stock model's weights, and move its second embedder."""
        net = filled(self.small, self.small.stored_weights(self.folder))
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if ".embed_r." in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
        return net


def filled(model: Model, weights: Weights) -> VelocityNet:
    """Build a network on the CPU with the values of `weights`."""
    net = model.build().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            shape = parameter.shape
            parameter.copy_(weights.read(net.stored_name(name), shape, 0, shape[0]))
    return net


def _ask_qwen(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    rows, _, height, width = x.shape
    pictures = [QwenImagePipeline._pack_latents(p, *p.shape) for p in (x, *cond.references)]
    tokens = model(
        hidden_states=torch.cat(pictures, dim=1),
        encoder_hidden_states=cond.tokens,
        encoder_hidden_states_mask=cond.mask,
        timestep=t,
        img_shapes=[[(1, height // 2, width // 2)] * len(pictures)] * rows,
        return_dict=False,
    )[0][:, : pictures[0].shape[1]]
    out: Tensor = QwenImagePipeline._unpack_latents(tokens, height * 8, width * 8, 8)[:, :, 0]
    return out


def _ask_sana(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    out: Tensor = model(
        x,
        encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.mask,
        timestep=1000 * t,
        return_dict=False,
    )[0]
    return out


def _ask_sd3(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    out: Tensor = model(
        hidden_states=x,
        timestep=1000 * t,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        return_dict=False,
    )[0]
    return out


def _ask_z_image(model: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    texts = [row[seen] for row, seen in zip(cond.tokens, cond.full_mask(), strict=True)]
    out = model(list(x.unsqueeze(2).unbind()), 1 - t, texts, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


FAMILIES = {
    "qwen_image": Family(
        small=QwenImage(layers=2, heads=2, head_dim=8, text_width=12, channels=4, rope=[4, 2, 2]),
        stock=QwenImageTransformer2DModel,
        ask=_ask_qwen,
        frozen=("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        released=(
            Released(
                model=QwenImage(), stock=20_430_401_088, second=10_229_760, block=339_831_296
            ),
        ),
    ),
    "qwen_image_edit": Family(
        small=QwenImageEdit(
            layers=2, heads=2, head_dim=8, text_width=12, channels=4, rope=[4, 2, 2],
            zero_cond_t=True,
        ),
        stock=QwenImageTransformer2DModel,
        ask=_ask_qwen,
        references=2,
        frozen=("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        released=(
            Released(
                model=QwenImageEdit(), stock=20_430_401_088, second=10_229_760,
                block=339_831_296,
            ),
        ),
    ),
    "sana": Family(
        small=Sana(layers=2, heads=4, head_dim=4, cross_heads=2, text_width=12, channels=4),
        stock=SanaTransformer2DModel,
        ask=_ask_sana,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, flow_shift=3.0
        ),
        released=(
            Released(
                model=sana_600m(), stock=591_747_872, second=9_593_856, block=20_646_144
            ),
            Released(model=Sana(), stock=1_604_462_752, second=35_714_560, block=77_920_640),
        ),
    ),
    "sd3": Family(
        small=SD3(
            layers=3, heads=2, head_dim=8, dual=2, text_width=12, pooled_width=10, channels=4,
            positions=6,
        ),
        stock=SD3Transformer2DModel,
        ask=_ask_sd3,
        pads=False,
        frozen=("pos_embed.pos_embed",),
        released=(
            Released(
                model=SD3(), stock=2_469_663_936, second=8_263_680, block=101_506_944
            ),
        ),
    ),
    "z_image": Family(
        small=ZImage(
            layers=2, refiner_layers=1, heads=2, head_dim=8, text_width=12, channels=4,
            rope=[4, 2, 2],
        ),
        stock=ZImageTransformer2DModel,
        ask=_ask_z_image,
        released=(
            Released(
                model=ZImage(), stock=6_154_908_736, second=525_568, block=180_910_336
            ),
        ),
    ),
}  # fmt: skip
