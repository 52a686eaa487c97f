"""A Z-Image pipeline folder in the released format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.pipelines import tokenizers, vae
from twinflow_train.models.z_image import ZImage

WIDTH = 16
SIZE = ZImage(layers=2, refiner_layers=1, heads=2, head_dim=8, text_width=WIDTH, rope=[4, 2, 2])
WORDS = "user\nassistant\na red apple on the table\n"


def write_pipeline(folder: Path) -> Path:
    """Write the folder and return it; the same values every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae.shifted(shift=0.1159, scale=0.3611),
            text_encoder=Qwen3Model(
                Qwen3Config(
                    vocab_size=tokenizers.VOCABULARY, hidden_size=WIDTH, intermediate_size=32,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                    max_position_embeddings=1024,
                )
            ),
            tokenizer=tokenizers.qwen(WORDS, ["<|im_start|>", "<|im_end|>"]),
            transformer=ZImageTransformer2DModel(**SIZE.stock_arguments()),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
