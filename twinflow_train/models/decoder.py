"""A VAE alone, for pictures of latents where no text encoder is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.errors import UserError
from twinflow_train.models.hub import REPOSITORY, download
from twinflow_train.models.pipeline_codec import loading, without_bars

Decoder = Callable[[Tensor], Tensor]
"""Turns normalised latents (b, c, hl, wl) into pictures (b, 3, h, w) in [-1, 1], in float32."""


def pixels(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Show latents that are pixels already, of 1 or 3 colours."""
    return latents.float().expand(-1, 3, -1, -1)


def find_vae(where: str, *, key: str) -> Path:
    """Find a VAE: its folder, that of the pipeline around it, or a repository; else UserError.

    key: of the configuration that named it, for messages.
    """
    folder, (name, _, revision) = Path(where), where.partition("@")
    if not folder.exists() and REPOSITORY.fullmatch(name):
        folder = download(name, revision=revision or None, patterns=["vae/*"], key=key)
    inner = folder / "vae"
    found = inner if inner.is_dir() else folder
    try:
        said = json.loads((found / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}: {where} has no VAE (vae/config.json): give a diffusers pipeline folder, or "
            "REPOSITORY@REVISION of the Hugging Face hub"
        ) from error
    if said not in _DECODERS:
        raise UserError(f"{key}: {where} has a {said}; known are {', '.join(_DECODERS)}")
    return found


def open_decoder(folder: Path, device: torch.device) -> Decoder:
    """Load a VAE that `find_vae` found: in bfloat16 on a GPU, in float32 on a CPU."""
    # The owner of the library, and heavy: imported only where a VAE is opened.
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage

    classes: dict[str, Any] = {
        "AutoencoderDC": AutoencoderDC,
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderKLQwenImage": AutoencoderKLQwenImage,
    }
    said: str = json.loads((folder / "config.json").read_text())["_class_name"]
    without_bars()
    with loading(folder):
        vae = classes[said].from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    vae = vae.to(device).eval()
    unscaled = _DECODERS[said]

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        found = unscaled(latents.to(device, torch.float32), vae.config).to(vae.dtype)
        shown: Tensor = vae.decode(found).sample
        return (shown[:, :, 0] if shown.ndim == 5 else shown).float()

    return decode


def _qwen(latents: Tensor, config: Any) -> Tensor:
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    # Divided by the inverse, as the stock pipeline does, and a frame axis of one.
    return (latents / (1.0 / std) + mean)[:, :, None]


def _shifted(latents: Tensor, config: Any) -> Tensor:
    mean: Tensor = latents / config.scaling_factor + config.shift_factor
    return mean


def _scaled(latents: Tensor, config: Any) -> Tensor:
    found: Tensor = latents / config.scaling_factor
    return found


_DECODERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "AutoencoderDC": _scaled,
    "AutoencoderKL": _shifted,
    "AutoencoderKLQwenImage": _qwen,
}
