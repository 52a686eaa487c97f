"""Qwen-Image-Edit's codec against the stock pipelines, on tiny ones in the released format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from torch import Tensor

from tests.encoding.tools import picture, pixels
from tests.pipelines.qwen_image import EDIT_PREFIX, write_pipeline
from tests.pipelines.qwen_image_edit import write_edit_pipeline
from twinflow_train.encoding.pictures import scaled
from twinflow_train.errors import UserError
from twinflow_train.models.qwen_codec import QwenImageEncoders
from twinflow_train.models.qwen_edit_codec import (
    FIRST,
    PLUS,
    QwenImageEditCodec,
    QwenImageEditEncoders,
    picture_processor,
    place_pictures,
)
from twinflow_train.models.qwen_image import pack

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {PLUS: QwenImageEditPlusPipeline, FIRST: QwenImageEditPipeline}
PROMPTS = ["make {} red, 90%", "Edit this image."]
SHOWN = [picture(1, 64, 64), picture(2, 48, 80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_edit_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same parts as a pipeline of the first release."""
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("first") / "first"))
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": FIRST}))
    return copy


def opened(folder: Path) -> QwenImageEditCodec:
    encoders = QwenImageEditEncoders(path=str(folder))
    return encoders.open(encoders.find(), CPU)


def stock_pipeline(folder: Path, kind: str) -> Any:
    """Open a stock pipeline whose text encoder knows where pictures stand, as it was trained."""
    stock = KINDS[kind].from_pretrained(folder, processor=picture_processor(folder))
    place_pictures(stock.text_encoder)
    return stock


@pytest.fixture(scope="module")
def codec(folder: Path) -> QwenImageEditCodec:
    return opened(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return stock_pipeline(folder, PLUS)


def called(stock: Any, images: Image.Image | list[Image.Image], prompt: str) -> dict[str, Any]:
    """Run the stock pipeline to its first question to the transformer, and return that."""

    class Asked(Exception):
        pass

    def ask(module: Any, args: Any, named: dict[str, Any]) -> None:
        raise Asked(named)

    hook = stock.transformer.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        with pytest.raises(Asked) as asked:
            stock(images, prompt, num_inference_steps=1, true_cfg_scale=1.0, width=64, height=64)
    finally:
        hook.remove()
    found: dict[str, Any] = asked.value.args[0]
    return found


def test_the_tiny_template_ends_where_the_released_one_does(stock: Any) -> None:
    """Else the stock pipeline would cut elsewhere, and the tests would hold of nothing real."""
    assert stock.prompt_template_encode.startswith(EDIT_PREFIX)
    assert len(stock.tokenizer(EDIT_PREFIX).input_ids) == stock.prompt_template_encode_start_idx


@pytest.mark.parametrize("many", [1, 2])
@torch.no_grad()
def test_a_prompt_is_embedded_as_the_stock_pipeline_does_in_its_own_call(
    codec: QwenImageEditCodec, stock: Any, many: int
) -> None:
    found = codec.embed_edits(PROMPTS, [pixels(image) for image in SHOWN[:many]])
    for prompt, ours in zip(PROMPTS, found, strict=True):
        theirs = called(stock, SHOWN[:many], prompt)
        assert theirs["encoder_hidden_states_mask"] is None
        assert torch.equal(ours.tokens, theirs["encoder_hidden_states"][0])
        assert len(ours) > 190 * many  # 384 x 384 pixels are 14 x 14 tokens
        assert ours.pooled is None


@torch.no_grad()
def test_the_first_release_sees_one_large_picture(first: Path) -> None:
    codec, stock = opened(first), stock_pipeline(first, FIRST)
    (ours,) = codec.embed_edits(PROMPTS[:1], [pixels(SHOWN[0])])
    theirs = called(stock, SHOWN[0], PROMPTS[0])
    assert torch.equal(ours.tokens, theirs["encoder_hidden_states"][0])
    assert len(ours) > 1200
    with pytest.raises(UserError, match=r"source\.references is 2, .* takes 1"):
        codec.embed_edits(PROMPTS, [pixels(image) for image in SHOWN])


@torch.no_grad()
def test_pictures_their_order_and_the_prompt_matter(codec: QwenImageEditCodec) -> None:
    one, other = map(pixels, SHOWN)
    found = [
        codec.embed_edits(PROMPTS[:1], references)[0].tokens[-6:]
        for references in ([one], [other], [one, other], [other, one])
    ]
    for n, here in enumerate(found):
        assert all(float((here - there).abs().max()) > 1e-3 for there in found[n + 1 :])
    words = [one.tokens[-5:] for one in codec.embed_edits(PROMPTS, [one])]
    assert float((words[0] - words[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_a_pictures_tokens_stand_in_two_axes(folder: Path, codec: QwenImageEditCodec) -> None:
    """diffusers 0.42 with transformers 5 lets them stand in a line, which nobody trained on."""
    places: list[Tensor] = []
    hook = codec._pipeline.text_encoder.model.language_model.register_forward_pre_hook(
        lambda module, args, named: places.append(named["position_ids"]), with_kwargs=True
    )
    codec.embed_edits(PROMPTS[:1], [pixels(SHOWN[0])])
    hook.remove()
    (place,) = places
    frame, height, width = place[-3:, 0]
    inside = (height != width).nonzero().flatten()
    assert len(set(height[inside].tolist())) == len(set(width[inside].tolist())) == 14
    assert len(set(frame[inside[0] : inside[-1]].tolist())) == 1
    alone = KINDS[PLUS].from_pretrained(folder, processor=picture_processor(folder))
    (ours,) = codec.embed_edits(PROMPTS[:1], [pixels(SHOWN[0])])
    theirs = called(alone, SHOWN[:1], PROMPTS[0])["encoder_hidden_states"][0]
    assert ours.tokens.shape == theirs.shape
    assert not torch.equal(ours.tokens, theirs)


@torch.no_grad()
def test_a_reference_becomes_the_latent_that_the_stock_pipeline_makes(
    codec: QwenImageEditCodec, stock: Any
) -> None:
    images = [picture(n, 64, 48) for n in range(2)]
    ready = [stock.image_processor.preprocess(one, 64, 48).unsqueeze(2) for one in images]
    _, theirs = stock.prepare_latents(
        ready, 1, 16, 64, 48, torch.float32, CPU, torch.Generator().manual_seed(0)
    )
    latents = codec.encode(scaled(torch.stack([pixels(image) for image in images])))
    ours = torch.cat([pack(latent[None], 2) for latent in latents], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_pictures_a_prompt_is_embedded_as_the_stock_pipeline_does(
    codec: QwenImageEditCodec, stock: Any
) -> None:
    for prompt, ours in zip(PROMPTS, codec.embed(PROMPTS, at_once=1), strict=True):
        assert torch.equal(ours.tokens, stock.encode_prompt(prompt)[0][0])


def test_it_is_qwen_images_codec_with_another_null_prompt(codec: QwenImageEditCodec) -> None:
    assert codec.null_prompt == QwenImageEditEncoders.null_prompt == "Edit this image."
    assert QwenImageEditEncoders.edits
    assert (codec.multiple, codec.text_width) == (16, 16)
    assert codec.latent_shape(48, 32) == (16, 6, 4)


def test_another_familys_or_half_a_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = write_pipeline(tmp_path / "plain")
    with pytest.raises(UserError, match=r"lacks processor/tokenizer_config\.json"):
        QwenImageEditEncoders(path=str(plain)).find()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = copy / "model_index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps(said | {"_class_name": "QwenImagePipeline"}))
    with pytest.raises(UserError, match=r"is a QwenImagePipeline, not QwenImageEditPlusPipeline"):
        QwenImageEditEncoders(path=str(copy)).find()
    index.write_text(json.dumps(said | {"processor": ["transformers", "CLIPProcessor"]}))
    with pytest.raises(UserError, match=r"processor of .* is CLIPProcessor, not Qwen2VLProcessor"):
        QwenImageEditEncoders(path=str(copy)).find()
    index.write_text(json.dumps(said))
    (copy / "processor" / "preprocessor_config.json").write_text("{")
    encoders = QwenImageEditEncoders(path=str(copy))
    with pytest.raises(UserError, match=r"encoders\.path: .* cannot be loaded .*download it again"):
        encoders.open(encoders.find(), CPU)
    (copy / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"it lacks processor/preprocessor_config\.json;"):
        encoders.find()
    with pytest.raises(UserError, match=r"encoders\.path: Qwen/Qwen-Image-Edit-2509 is neither"):
        QwenImageEditEncoders().find()
    QwenImageEncoders(path=str(folder)).find()  # the same VAE and text encoder
