"""Qwen-Image-Edit pipeline folders in the released format: every part real, tiny and random."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from tests.pipelines.qwen_image import SIZE, text_config, tokenizer
from twinflow_train.models.qwen_edit_codec import PLUS
from twinflow_train.models.qwen_image_edit import QwenImageEdit

EDIT_SIZE = QwenImageEdit(
    **{key: value for key, value in vars(SIZE).items() if key != "target_time"}, zero_cond_t=True
)


def write_edit_pipeline(folder: Path, *, kind: str = PLUS) -> Path:
    """Write the folder of a release and return it; the same values every time."""
    words = tokenizer()
    special = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")
        )
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = QwenImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
            text_encoder=Qwen2_5_VLForConditionalGeneration(text_config(**special)),
            tokenizer=words,
            processor=None,
            transformer=QwenImageTransformer2DModel(**EDIT_SIZE.stock_arguments()),
        )
    pipeline.save_pretrained(folder)
    words.save_pretrained(folder / "processor")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    # The processor's own class needs torchvision; the files are what it writes.
    processor = {
        "processor_class": "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    _edit(folder / "processor" / "preprocessor_config.json", **processor)
    index = {"_class_name": kind, "processor": ["transformers", "Qwen2VLProcessor"]}
    _edit(folder / "model_index.json", **index)
    return folder


def older(size: QwenImageEdit = EDIT_SIZE) -> QwenImageEdit:
    """Give the model of the releases before 2511."""
    return replace(size, zero_cond_t=False)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))
