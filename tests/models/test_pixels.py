"""Latents that are pixels, and the text encoders that packages ship."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tools import check_length
from twinflow_train.errors import UserError
from twinflow_train.models.families import encoders_of
from twinflow_train.models.pixels import PixelEncoders, Text
from twinflow_train.models.qwen_codec import QwenImageEncoders
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.text import MiniLM, minilm_folder

CPU = torch.device("cpu")


def test_pictures_are_their_own_latents() -> None:
    encoders = PixelEncoders()
    codec = encoders.open(encoders.find(), CPU)
    pictures = torch.rand(2, 3, 8, 12) * 2 - 1
    assert codec.latent_shape(8, 12) == (3, 8, 12)
    assert torch.equal(codec.encode(pictures), pictures)
    assert torch.equal(codec.decode(pictures), pictures)


def test_grey_pictures_have_one_channel_and_come_back_in_three() -> None:
    encoders = PixelEncoders(channels=1, multiple=7)
    codec = encoders.open(encoders.find(), CPU)
    grey = torch.rand(1, 1, 28, 28).expand(-1, 3, -1, -1)
    latents = codec.encode(grey)
    assert latents.shape == (1, *codec.latent_shape(28, 28))
    torch.testing.assert_close(codec.decode(latents), grey)


def test_it_counts_what_of_a_prompt_is_read() -> None:
    encoders = PixelEncoders()
    check_length(encoders.open(encoders.find(), CPU), 512)


def test_texts_and_their_revision_are_those_of_the_recipes() -> None:
    encoders, plain = PixelEncoders(), MiniLM(minilm_folder())
    found = encoders.find()
    codec = encoders.open(found, CPU)
    (ours,), (theirs,) = codec.embed(["a red apple"], at_once=1), plain.encode(["a red apple"])
    assert torch.equal(ours.tokens, theirs)
    assert (found.name, found.revision) == (plain.name, plain.revision)
    assert codec.text_width == theirs.shape[-1]


def test_the_encoders_of_a_model_are_those_of_its_data() -> None:
    model = QwenImage(channels=1, patch=7)
    assert isinstance(encoders_of(model), QwenImageEncoders)
    for text in Text:
        found = encoders_of(model, made_by=text.encoder)
        assert isinstance(found, PixelEncoders)
        assert (found.text, found.channels, found.multiple) == (text, 1, 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 2}, "encoders.channels is 2; it must be 1 or 3"),
        ({"multiple": 0}, "encoders.multiple is 0; it must be 1 or more"),
        ({"path": "x"}, "leave out path"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PixelEncoders(**options)
