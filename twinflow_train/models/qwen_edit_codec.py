"""Qwen-Image-Edit's encoders: Qwen2.5-VL reads the prompt and looks at the reference images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from twinflow_train.batch import Embedding
from twinflow_train.errors import UserError
from twinflow_train.models import qwen_codec
from twinflow_train.models.codec import EditCodec, Parts, PipelineFolder, find_pipeline
from twinflow_train.models.pipeline_codec import loading, open_pipeline
from twinflow_train.models.qwen_codec import QwenImageCodec, QwenImageEncoders

PARTS: Parts = {**qwen_codec.PARTS, "processor": "Qwen2VLProcessor"}
PLUS = "QwenImageEditPlusPipeline"
"""The releases from 2509 on: any number of references, each shown with about 384x384 pixels."""
FIRST = "QwenImageEditPipeline"
"""The first release: one reference, shown with about 1024x1024 pixels."""


@dataclass(kw_only=True)
class QwenImageEditEncoders(QwenImageEncoders):
    """The VAE and the text encoder of any release of Qwen-Image-Edit, which look at references."""

    null_prompt: ClassVar[str] = "Edit this image."
    edits: ClassVar[bool] = True

    path: str = "Qwen/Qwen-Image-Edit-2509"

    def find(self) -> PipelineFolder:
        """Find all that encodes; UserError if it is missing, not whole or another family's."""
        found = find_pipeline(self.path, revision=self.revision, parts=PARTS)
        if (kind := release(found.path)) not in (PLUS, FIRST):
            raise UserError(
                f"encoders.path: {self.path} is a {kind}, not {PLUS} or {FIRST}: choose the "
                "encoders= of its family"
            )
        return found

    def open(self, folder: PipelineFolder, device: torch.device) -> QwenImageEditCodec:
        """Load it, and nothing else: in bfloat16 on a GPU, in float32 on a CPU."""
        return QwenImageEditCodec(folder, device)


def release(folder: Path) -> str:
    """Name the class of a pipeline's folder."""
    return str(json.loads((folder / "model_index.json").read_text()).get("_class_name"))


class QwenImageEditCodec(QwenImageCodec, EditCodec):
    """Encodes with the stock edit pipeline's own parts and methods.

    What the text encoder sees is the reference as it is trained on, so both see the same cut.
    """

    null_prompt = QwenImageEditEncoders.null_prompt

    def __init__(self, folder: PipelineFolder, device: torch.device) -> None:
        self._first = release(folder.path) == FIRST
        super().__init__(folder, device)
        place_pictures(self._pipeline.text_encoder)

    def _opened(self, folder: PipelineFolder) -> Any:
        """Open the stock pipeline."""
        from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

        with loading(folder.path):
            processor = picture_processor(folder.path)
        kind = QwenImageEditPipeline if self._first else QwenImageEditPlusPipeline
        return open_pipeline(kind, folder, self._device, processor=processor)

    @torch.no_grad()
    def embed_edits(
        self, prompts: Sequence[str], references: Sequence[UInt8[Tensor, "3 _ _"]]
    ) -> list[Embedding]:
        """Return the embedding of each prompt about the same reference images.

        One at a time, as the stock pipeline: a prompt beside a picture is some hundred tokens long.
        Raises UserError for more references than the release takes.
        """
        if self._first and len(references) != 1:
            raise UserError(
                f"source.references is {len(references)}, and this release of Qwen-Image-Edit "
                "takes 1: give source.references=1, or the encoders.path of a later release"
            )
        shown = [self._resized(picture) for picture in references]
        found = []
        for prompt in prompts:
            tokens, mask = self._pipeline.encode_prompt(
                prompt, image=shown[0] if self._first else shown, device=self._device
            )
            assert mask is None, "one prompt is not padded"
            found.append(Embedding(tokens[0]))
        return found

    def _resized(self, picture: UInt8[Tensor, "3 h w"]) -> Image.Image:
        """Show a reference to the text encoder in the size that the stock pipeline gives it."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
            CONDITION_IMAGE_SIZE,
            VAE_IMAGE_SIZE,
            calculate_dimensions,
        )

        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
        area = VAE_IMAGE_SIZE if self._first else CONDITION_IMAGE_SIZE
        width, height = calculate_dimensions(area, image.width / image.height)
        shown: Image.Image = self._pipeline.image_processor.resize(image, height, width)
        return shown


def picture_processor(folder: Path) -> Any:
    """Open a pipeline's processor of text and pictures.

    The stock one cannot be had without torchvision, which only its processor of videos takes: this
    is the stock class without that part.
    """
    from transformers import Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # transformers has no types
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
        ) -> None:
            self.image_token = "<|image_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token = self.video_token_id = None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    found: Any = PictureProcessor.from_pretrained(folder / "processor", local_files_only=True)
    return found


def place_pictures(text_encoder: Any) -> None:
    """Let the text encoder know which tokens are a picture's, to give them places in two axes.

    It was trained so, and found that out by itself up to version 4 of transformers; from 5 on it
    wants to be told, which diffusers 0.42 does not, and a picture's tokens would stand in a line.
    """
    picture = text_encoder.config.image_token_id

    def told(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        kinds = (named["input_ids"] == picture).int()
        return args, named | {"mm_token_type_ids": kinds}

    text_encoder.register_forward_pre_hook(told, with_kwargs=True)
