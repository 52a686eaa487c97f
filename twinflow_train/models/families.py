"""Which encoders go with which family of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from twinflow_train.models.base import Model
from twinflow_train.models.codec import Encoders
from twinflow_train.models.openuni import OpenUni
from twinflow_train.models.openuni_codec import OpenUniEncoders
from twinflow_train.models.pixels import PixelEncoders, Text
from twinflow_train.models.qwen_codec import QwenImageEncoders
from twinflow_train.models.qwen_edit_codec import QwenImageEditEncoders
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.qwen_image_edit import QwenImageEdit
from twinflow_train.models.sana import Sana
from twinflow_train.models.sana_codec import SanaEncoders
from twinflow_train.models.sd3 import SD3
from twinflow_train.models.sd3_codec import SD3Encoders
from twinflow_train.models.z_image import ZImage
from twinflow_train.models.z_image_codec import ZImageEncoders

OPTIONS: Mapping[str, Encoders] = {
    "qwen_image": QwenImageEncoders(),
    "qwen_image_edit": QwenImageEditEncoders(),
    "sana": SanaEncoders(),
    "sd35_medium": SD3Encoders(),
    "z_image": ZImageEncoders(),
    "openuni_l": OpenUniEncoders(),
    "pixels": PixelEncoders(),
}
"""The options of the group `encoders`; their `path` is where they were released."""

ENCODERS: Mapping[type[Model], str] = {
    QwenImage: "qwen_image",
    QwenImageEdit: "qwen_image_edit",
    OpenUni: "openuni_l",
    Sana: "sana",
    SD3: "sd35_medium",
    ZImage: "z_image",
}
"""The option that goes with each family."""


def encoders_of(model: Model, *, made_by: str = "") -> Encoders:
    """Return the encoders to sample a model with; their `path` is where they were released.

    made_by: what the manifest of its training data calls the encoder, if that is known: models of
    the built-in sets work on pixels.
    """
    for text in Text:
        if made_by == text.encoder:
            return PixelEncoders(text=text, channels=model.channels, multiple=model.patch)
    return replace(OPTIONS[ENCODERS[type(model)]])
