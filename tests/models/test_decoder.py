"""A VAE alone draws what the whole codec draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pipelines import qwen_image, sana, sd3, z_image
from twinflow_train.errors import UserError
from twinflow_train.models.codec import Encoders
from twinflow_train.models.decoder import find_vae, open_decoder, pixels
from twinflow_train.models.qwen_codec import QwenImageEncoders
from twinflow_train.models.sana_codec import SanaEncoders
from twinflow_train.models.sd3_codec import SD3Encoders
from twinflow_train.models.z_image_codec import ZImageEncoders

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("write", "encoders"),
    [
        (qwen_image.write_pipeline, QwenImageEncoders),
        (sana.write_pipeline, SanaEncoders),
        (sd3.write_pipeline, SD3Encoders),
        (z_image.write_pipeline, ZImageEncoders),
    ],
)
def test_it_is_the_codecs_own_decoder(
    tmp_path: Path, write: Callable[[Path], Path], encoders: type[Encoders]
) -> None:
    found = encoders(path=str(write(tmp_path / "whole")))
    codec = found.open(found.find(), CPU)
    shape = codec.latent_shape(2 * codec.multiple, 3 * codec.multiple)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    wanted = codec.decode(latents)
    # Without text encoders beside it.
    shutil.copytree(tmp_path / "whole" / "vae", tmp_path / "alone" / "vae")
    for where in (tmp_path / "alone", tmp_path / "alone" / "vae"):
        decode = open_decoder(find_vae(str(where), key="evals.decoder"), CPU)
        assert torch.equal(decode(latents), wanted)
    assert wanted.std() > 0


def test_pixels_are_shown_as_they_are() -> None:
    grey = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels(grey), grey.repeat(1, 3, 1, 1))


def test_what_is_no_vae_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evals\.decoder: .* has no VAE"):
        find_vae(str(tmp_path), key="evals.decoder")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UserError, match="has a VQModel; known are AutoencoderDC"):
        find_vae(str(tmp_path), key="evals.decoder")
