"""OpenUni's codec: the language model's answers to learned queries, and the stock autoencoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.pipelines import sana
from tests.pipelines.openuni import QUERIES, SIZE, WIDTH, released, write_pipeline
from twinflow_train.errors import UserError
from twinflow_train.models.openuni_codec import OpenUniCodec, OpenUniEncoders

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "Generate an image.", "of a {} and another one, quite far away"]
SAID = [
    "<|im_start|>user\nGenerate an image: a red apple<|im_end|>\n<|im_start|>assistant\n<img>",
    "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n<img>",
    "<|im_start|>user\nGenerate an image: of a {} and another one, quite far away<|im_end|>\n"
    "<|im_start|>assistant\n<img>",
]
"""What OpenUni's own program shows to the language model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("openuni") / "tiny")


def opened(folder: Path) -> OpenUniCodec:
    encoders = OpenUniEncoders(path=str(folder))
    return encoders.open(encoders.find(), CPU)


@pytest.fixture(scope="module")
def codec(folder: Path) -> OpenUniCodec:
    return opened(folder)


@torch.no_grad()
def stock(folder: Path, said: str) -> Tensor:
    """Ask the whole stock model, vision and all, as generation would."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)(said, return_tensors="pt").input_ids
    queries = released(SIZE, queries=QUERIES)["meta_queries"]
    found = model(
        inputs_embeds=torch.cat([model.get_input_embeddings()(words), queries[None]], dim=1),
        output_hidden_states=True,
    )
    answers: Tensor = found.hidden_states[-1][0, -QUERIES:]
    return answers


@torch.no_grad()
def test_a_prompt_is_what_the_stock_model_answers_to_the_queries(
    codec: OpenUniCodec, folder: Path
) -> None:
    for said, ours in zip(SAID, codec.embed(PROMPTS, at_once=1), strict=True):
        assert torch.equal(ours.tokens, stock(folder, said))
        assert ours.tokens.shape == (QUERIES, WIDTH)
        assert ours.pooled is None


def test_company_changes_no_prompt_and_all_are_equally_long(codec: OpenUniCodec) -> None:
    alone = codec.embed(PROMPTS, at_once=1)
    for at_once in (2, 3, 7):
        for one, other in zip(alone, codec.embed(PROMPTS, at_once=at_once), strict=True):
            torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-4, atol=1e-5)
    assert codec.embed([], at_once=2) == []
    assert float((alone[0].tokens - alone[1].tokens).abs().max()) > 1e-3


@torch.no_grad()
def test_pictures_go_through_the_stock_autoencoder(codec: OpenUniCodec, folder: Path) -> None:
    vae = AutoencoderDC.from_pretrained(folder / "vae").eval()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape(64, 96)) == (2, 4, 2, 3)
    assert torch.equal(latents, vae.encode(images)[0] * vae.config.scaling_factor)
    assert torch.equal(codec.decode(latents), vae.decode(latents / vae.config.scaling_factor)[0])
    assert (codec.multiple, codec.usual_size, codec.text_width) == (32, 512, WIDTH)
    assert codec.null_prompt == "Generate an image."


def test_all_three_parts_identify_the_encoders(folder: Path, tmp_path: Path) -> None:
    first = OpenUniEncoders(path=str(folder)).find().revision
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert OpenUniEncoders(path=str(copy)).find().revision == first
    checkpoint, vae = copy / "openuni_tiny.pth", copy / "vae" / "config.json"
    tensors = released(SIZE, queries=QUERIES)
    torch.save(tensors | {"projector.bias": tensors["projector.bias"] + 1}, checkpoint)
    assert OpenUniEncoders(path=str(copy)).find().revision == first
    torch.save(tensors | {"meta_queries": tensors["meta_queries"] + 1}, checkpoint)
    assert OpenUniEncoders(path=str(copy)).find().revision != first
    torch.save(tensors, checkpoint)
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 0.5}))
    assert OpenUniEncoders(path=str(copy)).find().revision != first


def test_parts_may_lie_in_different_places(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "vae").rename(tmp_path / "autoencoder")
    (copy / "openuni_tiny.pth").rename(tmp_path / "queries.pth")
    apart = OpenUniEncoders(
        path=str(copy),
        vae=str(tmp_path / "autoencoder"),
        queries=str(tmp_path / "queries.pth"),
    ).find()
    assert apart.revision == OpenUniEncoders(path=str(folder)).find().revision


def test_what_is_missing_or_of_others_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def refused(match: str, **keys: str) -> None:
        encoders = OpenUniEncoders(**({"path": str(copy)} | keys))
        with pytest.raises(UserError, match=match):
            encoders.open(encoders.find(), CPU)

    refused(r"encoders\.path: the folder .*nowhere does not exist", path=str(tmp_path / "nowhere"))
    refused(
        r"encoders\.path: OpenGVLab/InternVL3-2B-hf is neither", path="OpenGVLab/InternVL3-2B-hf"
    )
    refused(r"encoders\.queries: .*none\.pth does not exist", queries=str(tmp_path / "none.pth"))
    refused(r"encoders\.path: .*vae.* is of None, not internvl|lacks model", path=str(copy / "vae"))
    sana.autoencoder().save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderKL"}))
    refused(
        r"encoders\.vae: .* is of AutoencoderKL, not AutoencoderDC", vae=str(tmp_path / "other")
    )
    tensors = released(SIZE, queries=QUERIES)
    path = tmp_path / "some.pth"
    torch.save({key: value for key, value in tensors.items() if key != "meta_queries"}, path)
    refused(r"encoders\.queries: .* holds no meta_queries", queries=str(path))
    torch.save(tensors | {"meta_queries": torch.ones(5, 16)}, path)
    refused(r"queries of width 16, the language model in .* has width 12", queries=str(path))
    (copy / "second.pth").write_bytes(b"")
    refused(r"encoders\.queries: 2 files in .* end in \.pth, and one is wanted")
    (copy / "second.pth").unlink()
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    refused(r"encoders\.path: .* cannot be loaded .*download it again")
    (copy / "model.safetensors").unlink()
    refused(r"is not whole, it lacks model\.safetensors")
