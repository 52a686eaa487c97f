"""Feature networks in the released formats: every part real, tiny and random."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from tests.pipelines import tokenizers

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_clip(folder: Path) -> Path:
    """Write a folder of `CLIPModel`; the same values every time."""
    tokenizer = tokenizers.clip()
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CLIPModel(
            CLIPConfig(
                text_config={**SMALL, **words, **ends},
                vision_config={**SMALL, "image_size": 32, "patch_size": 8},
                projection_dim=8,
                initializer_factor=8.0,
            )
        )
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    """Write a folder of `Dinov2Model`; the same values every time."""
    config = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Dinov2Model(
            Dinov2Config(**config, image_size=28, patch_size=14, initializer_range=0.3)
        )
    net.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
    return folder


class _Pool(nn.Module):
    """Has the published file's signature; its features are colours of a coarse picture."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        coarse = nn.functional.adaptive_avg_pool2d(img.float() / 255, 4).flatten(1)
        return coarse if return_features else coarse[:, :1]


def write_inception(file: Path) -> Path:
    """Write a TorchScript file as that of Inception is called."""
    torch.jit.script(_Pool()).save(str(file))
    return file
