"""A Stable Diffusion 3.5 pipeline folder in the released format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.pipelines import tokenizers, vae
from twinflow_train.models.sd3 import SD3

WIDTH, POOLED = 16, 6
SIZE = SD3(
    layers=2, heads=2, head_dim=8, dual=1, text_width=WIDTH, pooled_width=2 * POOLED, positions=8
)


def write_pipeline(folder: Path) -> Path:
    """Write the folder and return it; the same values every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**SIZE.stock_arguments()),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae.shifted(shift=0.0609, scale=1.5305),
            text_encoder=CLIPTextModelWithProjection(_clip(6)),
            tokenizer=tokenizers.clip(),
            text_encoder_2=CLIPTextModelWithProjection(_clip(10)),
            tokenizer_2=tokenizers.clip(),
            text_encoder_3=T5EncoderModel(
                T5Config(
                    vocab_size=tokenizers.VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1,
                    num_heads=2, dropout_rate=0.0,
                )
            ),
            tokenizer_3=tokenizers.t5(),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=tokenizers.VOCABULARY,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
