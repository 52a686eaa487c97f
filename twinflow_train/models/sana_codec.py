"""SANA's encoders: its deep compression autoencoder, and Gemma 2 behind a long instruction."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.models.codec import (
    Codec,
    Encoders,
    Length,
    Parts,
    PipelineFolder,
    find_pipeline,
)
from twinflow_train.models.pipeline_codec import in_turn, open_pipeline

PARTS: Parts = {
    "vae": "AutoencoderDC",
    "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
    "tokenizer": ("GemmaTokenizerFast", "GemmaTokenizer"),
}


@dataclass(kw_only=True)
class SanaEncoders(Encoders):
    """The autoencoder and the text encoder of SANA, the same for all its sizes."""

    null_prompt: ClassVar[str] = ""

    path: str = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"

    def find(self) -> PipelineFolder:
        """Find both and the tokenizer; UserError if they are missing, not whole or others."""
        return find_pipeline(self.path, revision=self.revision, parts=PARTS)

    def open(self, folder: PipelineFolder, device: torch.device) -> SanaCodec:
        """Load both, and nothing else: in bfloat16 on a GPU, in float32 on a CPU."""
        return SanaCodec(folder, device)


class DeepCompression(Codec):
    """Pictures by `AutoencoderDC`, whose latents are multiplied by its scale."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self._vae, self._device = vae.eval(), device
        self.multiple = 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latent of a picture of this size in pixels."""
        return self._vae.config.latent_channels, height // self.multiple, width // self.multiple

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c hl wl"]:
        """Turn pictures in [-1, 1] into normalised latents, in float32."""
        latents: Tensor = self._vae.encode(images.to(self._device, self._vae.dtype)).latent
        scale: float = self._vae.config.scaling_factor
        return latents.float() * scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c hl wl"]) -> Float[Tensor, "b 3 h w"]:
        """Turn normalised latents into pictures in [-1, 1], in float32."""
        found = latents.to(self._device, torch.float32) / self._vae.config.scaling_factor
        images: Tensor = self._vae.decode(found.to(self._vae.dtype)).sample
        return images.float()


class SanaCodec(DeepCompression):
    """Encodes with the stock pipeline's own parts and methods."""

    null_prompt = SanaEncoders.null_prompt

    def __init__(self, folder: PipelineFolder, device: torch.device) -> None:
        # Heavy, and the owner of the library: imported only where a codec is opened.
        from diffusers import SanaPipeline

        self._pipeline = open_pipeline(SanaPipeline, folder, device)
        super().__init__(self._pipeline.vae, device)
        self.text_width = self._pipeline.text_encoder.eval().config.hidden_size
        asked = inspect.signature(SanaPipeline.__call__).parameters
        self._instruction: list[str] = asked["complex_human_instruction"].default
        self._most: int = asked["max_sequence_length"].default

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time.

        An empty prompt comes without the instruction, as the stock pipeline's negative one.
        """
        asked = [prompt for prompt in prompts if prompt]
        found = iter(in_turn(asked, at_once, self._instructed))
        nothing = self._encode([""], instruction=None) if len(asked) < len(prompts) else ()
        empty = next(iter(nothing), None)
        return [next(found) if prompt or empty is None else empty for prompt in prompts]

    def length(self, prompt: str) -> Length | None:
        """Count a prompt's tokens behind the instruction, two of which stand for those at its end.

        That is how the stock pipeline counts.
        """
        before = "\n".join(self._instruction)
        whole, opening = (
            len(self._pipeline.tokenizer(text, verbose=False).input_ids)
            for text in (before + prompt, before)
        )
        return Length(whole - opening + 2, self._most)

    def _instructed(self, prompts: list[str]) -> Iterator[Embedding]:
        return self._encode(prompts, instruction=self._instruction)

    def _encode(self, prompts: list[str], *, instruction: list[str] | None) -> Iterator[Embedding]:
        tokens, mask, _, _ = self._pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self._device,
            complex_human_instruction=instruction,
        )
        for row, seen in zip(tokens, mask, strict=True):
            yield Embedding(row[seen.bool()])
