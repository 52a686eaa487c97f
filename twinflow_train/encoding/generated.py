"""Latents that the base model generates itself: training data where there are only prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from twinflow_train.batch import Condition, Embedding
from twinflow_train.encoding.images import Chosen, Latents, Ready
from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import Sampler, Style, sample
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Codec, PipelineFolder
from twinflow_train.models.loading import filled
from twinflow_train.rng import generator


@dataclass(kw_only=True)
class Generated(Chosen):
    """Images of the base model, sampled in many steps with guidance, from each caption.

    init_from: a diffusers folder with the base's transformer, of the size that `model` says.
    seed: of the noise; each image's is a function of it and of the item's number.
    """

    generates: ClassVar[bool] = True

    init_from: str = "???"
    seed: int = 0
    sampler: Sampler = field(
        default_factory=lambda: Sampler(
            style=Style.multi, steps=50, kumaraswamy=[1.17, 0.8, 1.1], guidance=4.0
        )
    )

    def weights(self) -> str:
        """Hash the files of the base's transformer; UserError if there are none."""
        folder = Path(self.init_from)
        if not folder.is_dir():
            raise UserError(f"images.init_from: {folder} does not exist; give a diffusers folder")
        inner = folder / "transformer"
        found = inner if inner.is_dir() else folder
        # Named alike from both places.
        return PipelineFolder(found, found.name, None, (".",)).revision

    def open(self, codec: Codec, model: Model, device: torch.device) -> Latents:
        """Load the base beside the codec; UserError if it is missing or of another size."""
        for size in self.sizes:
            model.check(
                codec.latent_shape(*size), codec.text_width, pooled_width=codec.pooled_width
            )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weights = model.stored_weights(Path(self.init_from))
        velocity = model.pretrained(filled(model, weights, device=device, dtype=dtype))
        null = Condition.of(
            [one.to(device, torch.float32) for one in codec.embed([codec.null_prompt], at_once=1)]
        )

        def noise(name: str, number: int, *path: int, shape: Sequence[int]) -> Tensor:
            draw = generator("prepare", name, self.seed, number, *path)
            return torch.randn(*shape, generator=draw)

        def latents(batch: Sequence[Ready], texts: Sequence[Embedding]) -> Sequence[Tensor]:
            numbers = [each.item.number for each in batch]
            shape = codec.latent_shape(*batch[0].size)
            start = torch.stack([noise("start", n, shape=shape) for n in numbers])

            def eps(step: int) -> Tensor:
                return torch.stack([noise("eps", n, step, shape=shape) for n in numbers])

            cond = Condition.of([text.to(device, torch.float32) for text in texts]).to(device)
            return list(
                sample(
                    velocity, start.to(device), cond, self.sampler, null=null.to(device), eps=eps
                )
            )

        return latents
