"""Any text-to-image pipeline of diffusers, as it is, perhaps with a LoRA of a few-step method."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from twinflow_train.errors import UserError
from twinflow_train.models.pipeline_codec import without_bars
from twinflow_train.rng import generator


class StockPipeline:
    """Draws with the pipeline that a folder's model_index.json names.

    lora: a file of LoRA weights, loaded by the pipeline itself. guidance: given as `true_cfg_scale`
    where the pipeline has it, as Qwen-Image's does, else as `guidance_scale`.
    """

    def __init__(
        self,
        folder: str,
        *,
        lora: str | None,
        steps: int,
        guidance: float,
        height: int | None,
        width: int | None,
        seed: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self._pipeline = _opened(folder, device, dtype)
        if lora is not None:
            self._load(Path(lora))
        self._seed, self._device = seed, device
        taken = inspect.signature(type(self._pipeline).__call__).parameters
        scale = "true_cfg_scale" if "true_cfg_scale" in taken else "guidance_scale"
        said: dict[str, Any] = {"num_inference_steps": steps, scale: guidance}
        if "negative_prompt" in taken and guidance > 1:
            said["negative_prompt"] = " "
        sides = {"height": height, "width": width}
        self._said = said | {key: side for key, side in sides.items() if side is not None}

    def _load(self, file: Path) -> None:
        try:
            self._pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            AttributeError,
            SafetensorError,
        ) as error:
            raise UserError(
                f"baseline.lora: {type(self._pipeline).__name__} cannot load {file} "
                f"({' '.join(str(error).split())})"
            ) from error

    @torch.no_grad()
    def draw(
        self, texts: Sequence[str], *, images: int, first: int, batch: int
    ) -> tuple[list[Image.Image], float]:
        """Draw `images` pictures of each text, numbered from `first`; and the seconds of all of it.

        A picture is a function of the seed and its number.
        """
        prompts = [text for text in texts for _ in range(images)]
        drawn: list[Image.Image] = []
        began = time.perf_counter()
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            numbers = range(first + start, first + start + len(some))
            draws = [generator("stock", self._seed, number) for number in numbers]
            drawn += self._pipeline(some, generator=draws, **self._said).images
        return drawn, time.perf_counter() - began


def _opened(folder: str, device: torch.device, dtype: torch.dtype | None) -> Any:
    # The owner of the library, and heavy: imported only where a pipeline is opened.
    from diffusers import DiffusionPipeline

    without_bars()
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, dtype=dtype or usual, use_safetensors=True
        )
    except (
        OSError, ValueError, LookupError, RuntimeError, SafetensorError, AttributeError,
    ) as error:  # fmt: skip
        raise UserError(
            f"baseline.pipeline: {folder} cannot be loaded ({' '.join(str(error).split())})"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
