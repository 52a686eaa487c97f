"""Qwen-Image-Edit: Qwen-Image's transformer, which also sees one or more reference images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from twinflow_train.errors import UserError
from twinflow_train.models.qwen_image import QwenImage


@dataclass(kw_only=True)
class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit's transformer; the defaults are the released 20.4B network.

    zero_cond_t: reference images are modulated as what is clean, at time 0, and not as the noisy
    image: true for the release 2511, false for those before it.
    For the others see `QwenImage` and `Model`.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")

    zero_cond_t: bool = False

    def stock_config(self) -> dict[str, object]:
        """Give the stock class's configuration as its config.json has it, with `_class_name`."""
        return super().stock_config() | {"zero_cond_t": self.zero_cond_t}

    def check_extras(self, *, pooled_width: int, references: int) -> None:
        """Refuse data without reference images, and with pooled embeddings: UserError."""
        if not references:
            raise UserError(
                "the data has 0 reference images a sample, and model=qwen_image_edit wants 1 or "
                "more: prepare it with encoders=qwen_image_edit, or choose model=qwen_image"
            )
        super().check_extras(pooled_width=pooled_width, references=0)
