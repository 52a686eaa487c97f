"""Stable Diffusion 3.5's encoders: its VAE's mean, two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from twinflow_train.batch import Embedding
from twinflow_train.models.codec import Encoders, Length, Parts, PipelineFolder, find_pipeline
from twinflow_train.models.pipeline_codec import ShiftedVAE, in_turn, open_pipeline

CLIP, T5 = "CLIPTextModelWithProjection", ("T5TokenizerFast", "T5Tokenizer")
PARTS: Parts = {
    "vae": "AutoencoderKL",
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": "T5EncoderModel",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": T5,
}
PATCH = 2
"""Side of the square of latents that the transformer takes as one token."""
T5_TOKENS = 256
"""As many as the stock pipeline asks T5 for; with CLIP's 77 an embedding has 333, always."""


@dataclass(kw_only=True)
class SD3Encoders(Encoders):
    """The VAE and the three text encoders of Stable Diffusion 3.5 Medium."""

    null_prompt: ClassVar[str] = "Generate an image."

    path: str = "stabilityai/stable-diffusion-3.5-medium"

    def find(self) -> PipelineFolder:
        """Find them and their tokenizers; UserError if they are missing, not whole or others."""
        return find_pipeline(self.path, revision=self.revision, parts=PARTS)

    def open(self, folder: PipelineFolder, device: torch.device) -> SD3Codec:
        """Load them, and nothing else: in bfloat16 on a GPU, in float32 on a CPU."""
        return SD3Codec(folder, device)


class SD3Codec(ShiftedVAE):
    """Encodes with the stock pipeline's own parts and methods."""

    null_prompt = SD3Encoders.null_prompt

    def __init__(self, folder: PipelineFolder, device: torch.device) -> None:
        # Heavy, and the owner of the library: imported only where a codec is opened.
        from diffusers import StableDiffusion3Pipeline

        pipeline = open_pipeline(
            StableDiffusion3Pipeline, folder, device, image_encoder=None, feature_extractor=None
        )
        super().__init__(pipeline, device, patch=PATCH)
        clips = (pipeline.text_encoder.eval(), pipeline.text_encoder_2.eval())
        self.text_width = pipeline.text_encoder_3.eval().config.d_model
        self.pooled_width = sum(clip.config.projection_dim for clip in clips)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time; all have as many tokens.

        What fills a short prompt up is not padding: the network was trained to see it.
        """

        def encode(some: list[str]) -> Iterator[Embedding]:
            tokens, _, pooled, _ = self._pipeline.encode_prompt(
                some,
                None,
                None,
                device=self._device,
                do_classifier_free_guidance=False,
                max_sequence_length=T5_TOKENS,
            )
            return map(Embedding, tokens, pooled)

        return in_turn(prompts, at_once, encode)

    def length(self, prompt: str) -> Length | None:
        """Count a prompt's tokens for T5; both CLIPs are shown its opening alone, as released."""
        found = self._pipeline.tokenizer_3(prompt, verbose=False)
        return Length(len(found.input_ids), T5_TOKENS)
