"""No autoencoder: latents are pixels, and a small text encoder that a package ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.errors import UserError, check
from twinflow_train.models.codec import Codec, Encoders, Length, PipelineFolder
from twinflow_train.models.smollm import SmolLM2, smollm2_folder
from twinflow_train.models.text import MiniLM, minilm_folder

TextModel = MiniLM | SmolLM2


class Text(Enum):
    """Which text encoder: all-MiniLM-L6-v2 (384 wide), or SmolLM2-135M-Instruct (576)."""

    minilm = "minilm"
    smollm2 = "smollm2"

    @property
    def kind(self) -> Callable[[Path], TextModel]:
        """The class that encodes."""
        return MiniLM if self is Text.minilm else SmolLM2

    @property
    def encoder(self) -> str:
        """What manifests call it."""
        return MiniLM.name if self is Text.minilm else SmolLM2.name

    def folder(self) -> Path:
        """Find the weights that its package ships; UserError if it is not installed."""
        return minilm_folder() if self is Text.minilm else smollm2_folder()


@dataclass(kw_only=True)
class PixelEncoders(Encoders):
    """Pixels in [-1, 1] as latents, as the built-in recipes have them, for small pictures.

    text: the text encoder, from its package; `path` and `revision` are not used.
    channels: 3, or 1 for grey pictures. multiple: pixels that sizes are multiples of.
    """

    null_prompt: ClassVar[str] = "Generate an image."

    path: str = ""
    text: Text = Text.minilm
    channels: int = 3
    multiple: int = 4

    def __post_init__(self) -> None:
        rules = [
            ("channels", self.channels in (1, 3), "1 or 3"),
            ("multiple", self.multiple >= 1, "1 or more"),
        ]
        check("encoders", self, rules)
        if self.path or self.revision:
            raise UserError("encoders=pixels takes its text encoder from a package: leave out path")

    def find(self) -> PipelineFolder:
        """Find the text encoder's package; UserError if it is not installed."""
        encoder = self.text.kind(self.text.folder())
        return PipelineFolder(self.text.folder(), encoder.name, encoder.revision, ())

    def open(self, folder: PipelineFolder, device: torch.device) -> PixelCodec:
        """Load the text encoder, which computes on the CPU in float32."""
        return PixelCodec(self.text.kind(folder.path), self.channels, self.multiple)


class PixelCodec(Codec):
    """Pictures as they are, and a small text encoder."""

    null_prompt = PixelEncoders.null_prompt
    usual_size = 32

    def __init__(self, text: TextModel, channels: int, multiple: int) -> None:
        self._text, self._channels, self.multiple = text, channels, multiple
        self.text_width = text.encode([self.null_prompt])[0].shape[-1]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of a picture of this size in pixels."""
        return self._channels, height, width

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return pictures in [-1, 1], or their mean over the colours."""
        return images.float() if self._channels == 3 else images.float().mean(1, keepdim=True)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return pictures in colour, in float32."""
        return latents.float().expand(-1, 3, -1, -1)

    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time."""
        return [Embedding(tokens) for tokens in self._text.encode(prompts, at_once=at_once)]

    def length(self, prompt: str) -> Length | None:
        """Count a prompt's tokens; SmolLM2 reads any number."""
        if isinstance(self._text, SmolLM2):
            return None
        return Length(self._text.count(prompt), self._text.most)
