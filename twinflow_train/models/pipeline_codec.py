"""Codecs by a stock pipeline's own parts and methods: what those of all families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.errors import UserError
from twinflow_train.models.codec import Codec, PipelineFolder


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Load what lies in a folder; UserError if a file is damaged."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"encoders.path: {folder} cannot be loaded ({' '.join(str(error).split())}); "
            "download it again"
        ) from error


def without_bars() -> None:
    """Let the libraries load in silence."""
    # The owners of the libraries, and heavy: imported only where a codec is opened.
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_bar_of_weights

    disable_progress_bar()
    disable_bar_of_weights()


def open_pipeline(kind: Any, folder: PipelineFolder, device: torch.device, **parts: Any) -> Any:
    """Load the parts of a pipeline that encode: in bfloat16 on a GPU, in float32 on a CPU.

    kind: the pipeline's class. parts: those that were loaded already, and None for those that are
    left out besides network and scheduler.

    Raises:
        UserError: a file is damaged.
    """
    without_bars()
    with loading(folder.path):
        pipeline = kind.from_pretrained(
            folder.path,
            transformer=None,
            scheduler=None,
            **parts,
            variant=folder.variant,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    return pipeline.to(device)


def in_turn(
    prompts: Sequence[str], at_once: int, encode: Callable[[list[str]], Iterable[Embedding]]
) -> list[Embedding]:
    """Embed prompts `at_once` a time, those of like length together: padding costs as words do."""
    found: dict[int, Embedding] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), at_once):
        numbers = order[start : start + at_once]
        some = encode([prompts[number] for number in numbers])
        found |= dict(zip(numbers, some, strict=True))
    return [found[number] for number in range(len(prompts))]


class ShiftedVAE(Codec):
    """Pictures by `AutoencoderKL`, whose latents are (mean - shift) times its scale."""

    def __init__(self, pipeline: Any, device: torch.device, *, patch: int) -> None:
        self._pipeline, self._device = pipeline, device
        self._vae = pipeline.vae.eval()
        self.multiple = patch * pipeline.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latent of a picture of this size in pixels."""
        factor = self._pipeline.vae_scale_factor
        return self._vae.config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c hl wl"]:
        """Turn pictures in [-1, 1] into normalised latents: their mean, in float32."""
        pixels = images.to(self._device, self._vae.dtype)
        mean: Tensor = self._vae.encode(pixels).latent_dist.mode().float()
        shift: float = self._vae.config.shift_factor
        scale: float = self._vae.config.scaling_factor
        return (mean - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c hl wl"]) -> Float[Tensor, "b 3 h w"]:
        """Turn normalised latents into pictures in [-1, 1], in float32."""
        config = self._vae.config
        mean = latents.to(self._device, torch.float32) / config.scaling_factor
        mean = mean + config.shift_factor
        images: Tensor = self._vae.decode(mean.to(self._vae.dtype)).sample
        return images.float()
