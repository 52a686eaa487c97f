"""Z-Image's encoders: its VAE's mean, and Qwen3 behind its own chat template."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from twinflow_train.batch import Embedding
from twinflow_train.models.codec import Encoders, Length, Parts, PipelineFolder, find_pipeline
from twinflow_train.models.pipeline_codec import ShiftedVAE, in_turn, open_pipeline

PARTS: Parts = {
    "vae": "AutoencoderKL",
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
}
PATCH = 2
"""Side of the square of latents that the transformer takes as one token."""


@dataclass(kw_only=True)
class ZImageEncoders(Encoders):
    """The VAE and the text encoder of Z-Image, which its Turbo shares."""

    null_prompt: ClassVar[str] = ""

    path: str = "Tongyi-MAI/Z-Image"

    def find(self) -> PipelineFolder:
        """Find both and the tokenizer; UserError if they are missing, not whole or others."""
        return find_pipeline(self.path, revision=self.revision, parts=PARTS)

    def open(self, folder: PipelineFolder, device: torch.device) -> ZImageCodec:
        """Load both, and nothing else: in bfloat16 on a GPU, in float32 on a CPU."""
        return ZImageCodec(folder, device)


class ZImageCodec(ShiftedVAE):
    """Encodes with the stock pipeline's own parts and methods."""

    null_prompt = ZImageEncoders.null_prompt

    def __init__(self, folder: PipelineFolder, device: torch.device) -> None:
        # Heavy, and the owner of the library: imported only where a codec is opened.
        from diffusers import ZImagePipeline

        pipeline = open_pipeline(ZImagePipeline, folder, device)
        super().__init__(pipeline, device, patch=PATCH)
        asked = inspect.signature(ZImagePipeline.encode_prompt).parameters
        self._most: int = asked["max_sequence_length"].default
        self.text_width = pipeline.text_encoder.eval().config.hidden_size

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time."""

        def encode(some: list[str]) -> Iterator[Embedding]:
            found, _ = self._pipeline.encode_prompt(
                some, device=self._device, do_classifier_free_guidance=False
            )
            return map(Embedding, found)

        return in_turn(prompts, at_once, encode)

    def length(self, prompt: str) -> Length | None:
        """Count a prompt's tokens, with those of the template."""
        asked = self._pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        found = self._pipeline.tokenizer(asked, verbose=False)
        return Length(len(found.input_ids), self._most)
