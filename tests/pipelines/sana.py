"""A SANA pipeline folder in the released format."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model

from tests.pipelines import tokenizers
from twinflow_train.models.sana import Sana

WIDTH, CHANNELS = 16, 4
SIZE = Sana(layers=2, heads=4, head_dim=4, cross_heads=2, text_width=WIDTH, channels=CHANNELS)
INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


def write_pipeline(folder: Path) -> Path:
    """Write the folder and return it; the same values every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = SanaPipeline(
            tokenizer=tokenizers.gemma(INSTRUCTION),
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=tokenizers.VOCABULARY, hidden_size=WIDTH, intermediate_size=32,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                    pad_token_id=0, eos_token_id=1, bos_token_id=2,
                )
            ),
            vae=autoencoder(),
            transformer=SanaTransformer2DModel(**SIZE.stock_arguments()),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def autoencoder() -> AutoencoderDC:
    """Build the released kind of autoencoder: 32-fold, of convolutions and linear attention."""
    blocks = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    return AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((), (), (), (), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (), (5,), (5,)),
        scaling_factor=0.41407,
    )
