"""A Qwen-Image pipeline folder in the released format: every part real, tiny and random."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.pipelines import tokenizers
from twinflow_train.models.qwen_image import QwenImage

WIDTH = 16
SIZE = QwenImage(layers=2, heads=2, head_dim=8, text_width=WIDTH, channels=16, rope=[4, 2, 2])
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
"""What stands before a prompt. Each word is one token here as in the released tokenizer: 34."""
EDIT_PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
)
"""The same of the edit pipelines, whose tokenizer is the same one: 64."""


def write_pipeline(folder: Path) -> Path:
    """Write the folder and return it; the same values every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
            text_encoder=Qwen2_5_VLForConditionalGeneration(text_config()),
            tokenizer=tokenizer(),
            transformer=QwenImageTransformer2DModel(**_transformer_config()),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer_config() -> dict[str, object]:
    return {key: value for key, value in SIZE.config().items() if not key.startswith("_")}


def tokenizer() -> Qwen2Tokenizer:
    """Train the real class's byte-level BPE on the templates' own words."""
    words = PREFIX + EDIT_PREFIX
    for token in SPECIAL:
        words = words.replace(token, "\n")
    return tokenizers.qwen(words, SPECIAL)


def text_config(**tokens: int) -> Qwen2_5_VLConfig:
    """Configure a tiny text encoder; tokens: ids of special ones, where pictures are shown."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return Qwen2_5_VLConfig(
        **ends,
        **tokens,
        text_config={
            **ends,
            "vocab_size": 1024,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_scaling": {
                "mrope_section": [1, 1, 2],
                "rope_type": "default",
                "type": "default",
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
