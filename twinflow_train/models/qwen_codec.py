"""Qwen-Image's encoders: its VAE's mean, and Qwen2.5-VL behind the pipeline's own template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.models.codec import Codec, Encoders, Length, PipelineFolder, find_pipeline
from twinflow_train.models.pipeline_codec import in_turn, open_pipeline

PARTS = {
    "vae": "AutoencoderKLQwenImage",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "tokenizer": "Qwen2Tokenizer",
}
PATCH = 2
"""Side of the square of latents that the transformer takes as one token."""


@dataclass(kw_only=True)
class QwenImageEncoders(Encoders):
    """The VAE and the text encoder of Qwen-Image, about 17 GB of its repository's 58."""

    null_prompt: ClassVar[str] = "Generate an image."

    path: str = "Qwen/Qwen-Image"

    def find(self) -> PipelineFolder:
        """Find both and the tokenizer; UserError if they are missing, not whole or others."""
        return find_pipeline(self.path, revision=self.revision, parts=PARTS)

    def open(self, folder: PipelineFolder, device: torch.device) -> QwenImageCodec:
        """Load both, and nothing else: in bfloat16 on a GPU, in float32 on a CPU."""
        return QwenImageCodec(folder, device)


class QwenImageCodec(Codec):
    """Encodes with the stock pipeline's own parts and methods."""

    null_prompt = QwenImageEncoders.null_prompt

    def __init__(self, folder: PipelineFolder, device: torch.device) -> None:
        self._device = device
        self._pipeline = self._opened(folder)
        self._vae = self._pipeline.vae.eval()
        self.text_width = self._pipeline.text_encoder.eval().config.text_config.hidden_size
        self.multiple = PATCH * self._pipeline.vae_scale_factor
        # As the stock pipeline has them: the inverse is rounded before it is used.
        config = self._vae.config
        self._mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1)
        self._scale = 1.0 / torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1)

    def _opened(self, folder: PipelineFolder) -> Any:
        """Open the stock pipeline."""
        # Heavy, and the owner of the library: imported only where a codec is opened.
        from diffusers import QwenImagePipeline

        return open_pipeline(QwenImagePipeline, folder, self._device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latent of a picture of this size in pixels."""
        factor = self._pipeline.vae_scale_factor
        return self._vae.config.z_dim, height // factor, width // factor

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c hl wl"]:
        """Turn pictures in [-1, 1] into normalised latents: their mean, in float32."""
        frames = images.to(self._device, self._vae.dtype).unsqueeze(2)
        mean: Tensor = self._vae.encode(frames).latent_dist.mode().squeeze(2).float()
        return (mean - self._mean) * self._scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c hl wl"]) -> Float[Tensor, "b 3 h w"]:
        """Turn normalised latents into pictures in [-1, 1], in float32."""
        mean = latents.to(self._device, torch.float32) / self._scale + self._mean
        images: Tensor = self._vae.decode(mean.to(self._vae.dtype).unsqueeze(2)).sample
        return images.squeeze(2).float()

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time.

        Prompts of like length go together: padding costs as much as words.
        """

        def encode(some: list[str]) -> Iterator[Embedding]:
            tokens, mask = self._pipeline.encode_prompt(some, device=self._device)
            for row, each in enumerate(tokens):
                yield Embedding(each if mask is None else each[mask[row].bool()])

        return in_turn(prompts, at_once, encode)

    def length(self, prompt: str) -> Length | None:
        """Count a prompt's tokens, with those of the template that stand after it."""
        pipeline = self._pipeline
        found = pipeline.tokenizer(pipeline.prompt_template_encode.format(prompt), verbose=False)
        shown = len(found.input_ids) - pipeline.prompt_template_encode_start_idx
        return Length(shown, pipeline.tokenizer_max_length)
