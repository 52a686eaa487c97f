"""Every codec against the stock pipeline it is made of, on a tiny one in the released format.

To add one: a `Coded` in CODECS. (Qwen-Image's own tests stand beside this file.)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline, StableDiffusion3Pipeline, ZImagePipeline
from torch import Tensor

from tests.models.tools import check_length
from tests.pipelines import sana, sd3, z_image
from twinflow_train.batch import Embedding
from twinflow_train.errors import UserError
from twinflow_train.models.codec import Codec, Encoders
from twinflow_train.models.sana_codec import SanaEncoders
from twinflow_train.models.sd3_codec import SD3Encoders
from twinflow_train.models.z_image_codec import ZImageEncoders

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "", "the color and the size of {} objects, 90% and more", "Text: <b>"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """A family's codec.

    write: writes the tiny pipeline. stock: its class. embed(pipeline, prompt): the one prompt as
    that pipeline embeds it. latents(pipeline, pictures), pictures(pipeline, latents): as it has
    them. null: its null prompt. multiple: of pixels. parts: of the pipeline that it needs.
    """

    encoders: type[Encoders]
    write: Callable[[Path], Path]
    stock: type[Any]
    embed: Callable[[Any, str], Embedding]
    latents: Callable[[Any, Tensor], Tensor]
    pictures: Callable[[Any, Tensor], Tensor]
    null: str
    multiple: int
    parts: int


def _sd3(pipeline: Any, prompt: str) -> Embedding:
    tokens, _, pooled, _ = pipeline.encode_prompt(prompt, None, None)
    return Embedding(tokens[0], pooled[0])


def _sana(pipeline: Any, prompt: str) -> Embedding:
    """Ask as its own call does, for an empty prompt as for a negative one."""
    if prompt:
        asked = sana.INSTRUCTION.split("\n")
        tokens, mask, *_ = pipeline.encode_prompt(prompt, False, complex_human_instruction=asked)
    else:
        *_, tokens, mask = pipeline.encode_prompt("x", True, "")
    return Embedding(tokens[0][mask[0].bool()])


def _z_image(pipeline: Any, prompt: str) -> Embedding:
    (tokens,), (negative,) = pipeline.encode_prompt(prompt)
    if not prompt:
        assert torch.equal(tokens, negative)
    return Embedding(tokens)


def _shifted(pipeline: Any, images: Tensor) -> Tensor:
    config = pipeline.vae.config
    mean: Tensor = pipeline.vae.encode(images).latent_dist.mean
    return (mean - config.shift_factor) * config.scaling_factor


def _unshifted(pipeline: Any, latents: Tensor) -> Tensor:
    config = pipeline.vae.config
    latents = (latents / config.scaling_factor) + config.shift_factor
    found: Tensor = pipeline.vae.decode(latents, return_dict=False)[0]
    return found


def _scaled(pipeline: Any, images: Tensor) -> Tensor:
    found: Tensor = pipeline.vae.encode(images).latent * pipeline.vae.config.scaling_factor
    return found


def _unscaled(pipeline: Any, latents: Tensor) -> Tensor:
    latents = latents / pipeline.vae.config.scaling_factor
    found: Tensor = pipeline.vae.decode(latents, return_dict=False)[0]
    return found


CODECS = {
    "sana": Coded(
        encoders=SanaEncoders, write=sana.write_pipeline, stock=SanaPipeline, embed=_sana,
        latents=_scaled, pictures=_unscaled, null="", multiple=32, parts=3,
    ),
    "sd3": Coded(
        encoders=SD3Encoders, write=sd3.write_pipeline, stock=StableDiffusion3Pipeline, embed=_sd3,
        latents=_shifted, pictures=_unshifted, null="Generate an image.", multiple=16, parts=7,
    ),
    "z_image": Coded(
        encoders=ZImageEncoders, write=z_image.write_pipeline, stock=ZImagePipeline,
        embed=_z_image, latents=_shifted, pictures=_unshifted, null="", multiple=16, parts=3,
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", list(CODECS))
SCRATCH = TemporaryDirectory(prefix="codecs-")


@cache
def folder(name: str) -> Path:
    return CODECS[name].write(Path(SCRATCH.name, name))


@cache
def stock(name: str) -> Any:
    return CODECS[name].stock.from_pretrained(folder(name))


@cache
def codec(name: str) -> Codec:
    """Open a copy without what a codec does not need."""
    copy = Path(SCRATCH.name, f"{name}-encoders")
    shutil.copytree(folder(name), copy, ignore=shutil.ignore_patterns("transformer", "scheduler"))
    encoders = CODECS[name].encoders(path=str(copy))
    found = encoders.find()
    assert len(found.parts) == CODECS[name].parts
    return encoders.open(found, CPU)


def pictures(rows: int, height: int = 96, width: int = 64) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def same(one: Embedding, other: Embedding) -> bool:
    if one.pooled is None or other.pooled is None:
        return one.pooled is other.pooled and torch.equal(one.tokens, other.tokens)
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)


@every
@torch.no_grad()
def test_a_prompt_is_embedded_as_the_stock_pipeline_embeds_it(name: str) -> None:
    ours = codec(name).embed(PROMPTS, at_once=1)
    assert len({one.tokens.double().sum().item() for one in ours}) == len(PROMPTS)
    for prompt, one in zip(PROMPTS, ours, strict=True):
        assert same(one, CODECS[name].embed(stock(name), prompt)), prompt
        assert one.widths == (codec(name).text_width, codec(name).pooled_width)
        assert len(one) > 0


@every
@torch.no_grad()
def test_prompts_that_are_encoded_together_come_in_order(name: str) -> None:
    alone = codec(name).embed(PROMPTS, at_once=1)
    for at_once in (2, 3, 9):
        for one, other in zip(codec(name).embed(PROMPTS, at_once=at_once), alone, strict=True):
            torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-4, atol=1e-5)
            if one.pooled is not None:
                assert other.pooled is not None
                torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-4, atol=1e-5)
    assert codec(name).embed([], at_once=4) == []


@every
@torch.no_grad()
def test_latents_and_pictures_are_those_of_the_stock_pipeline(name: str) -> None:
    images = pictures(2)
    latents = codec(name).encode(images)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, *codec(name).latent_shape(96, 64))
    assert torch.equal(latents, CODECS[name].latents(stock(name), images))
    decoded = codec(name).decode(latents)
    assert decoded.shape == images.shape
    assert torch.equal(decoded, CODECS[name].pictures(stock(name), latents))


@every
def test_it_says_what_a_set_has_to_know(name: str) -> None:
    found, coded = codec(name), CODECS[name]
    assert found.multiple == coded.multiple
    assert found.null_prompt == coded.encoders.null_prompt == coded.null


@pytest.mark.parametrize(("name", "most"), [("sana", 300), ("sd3", 256), ("z_image", 512)])
def test_it_counts_what_of_a_prompt_is_read(name: str, most: int) -> None:
    check_length(codec(name), most)


def test_sd3_s_embeddings_all_have_as_many_tokens() -> None:
    long = "a red apple on the table, " * 40
    found = codec("sd3").embed(["", "apple", long], at_once=2)
    assert {len(one) for one in found} == {77 + 256}
    assert codec("sd3").pooled_width == 2 * sd3.POOLED


def test_sana_s_long_prompts_are_cut_and_keep_the_instruction_s_end() -> None:
    short, long = codec("sana").embed(["apple", "apple " * 400], at_once=2)
    assert len(short) < 20
    assert len(long) == 300


@every
def test_what_is_not_here_says_what_to_download(name: str) -> None:
    encoders = CODECS[name].encoders()
    with pytest.raises(UserError) as error:
        encoders.find()
    said = str(error.value)
    assert said.startswith(f"encoders.path: {encoders.path} is neither a folder here")
    assert said.count("/*'") == CODECS[name].parts
    assert "give encoders.path=FOLDER" in said


@every
@pytest.mark.parametrize("other", list(CODECS))
def test_another_family_s_pipeline_is_refused(name: str, other: str) -> None:
    if name != other:
        with pytest.raises(UserError, match=r"encoders\.path: .* (lacks|not) .*"):
            CODECS[name].encoders(path=str(folder(other))).find()


@pytest.mark.parametrize("part", ["text_encoder_2", "text_encoder_3", "tokenizer_3"])
def test_a_missing_text_encoder_of_several_is_named(tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copytree(folder("sd3"), tmp_path / "copy"))
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"it lacks {part}/"):
        SD3Encoders(path=str(copy)).find()


@torch.no_grad()
def test_files_of_another_type_are_taken_where_there_are_no_plain_ones(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder("sana"), tmp_path / "copy"))
    stock("sana").vae.save_pretrained(copy / "vae", variant="bf16")
    encoders = SanaEncoders(path=str(copy))
    assert encoders.find().variant is None
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    found = encoders.find()
    assert found.variant == "bf16"
    latents = encoders.open(found, CPU).encode(pictures(1))
    assert torch.equal(latents, codec("sana").encode(pictures(1)))
    (copy / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks vae/diffusion_pytorch_model\.safetensors, text_"):
        encoders.find()


@pytest.mark.gpu
@every
@torch.no_grad()
def test_on_a_gpu_it_computes_in_bfloat16_near_the_cpu(name: str) -> None:
    encoders = CODECS[name].encoders(path=str(folder(name)))
    on_gpu = encoders.open(encoders.find(), torch.device("cuda", 0))
    latents, own = on_gpu.encode(pictures(2)).cpu(), codec(name).encode(pictures(2))
    assert latents.dtype == torch.float32
    assert float((latents - own).norm() / own.norm()) < 0.05
    found = zip(
        on_gpu.embed(PROMPTS, at_once=4), codec(name).embed(PROMPTS, at_once=4), strict=True
    )
    for one, other in found:
        assert one.tokens.dtype == torch.bfloat16
        gap = (one.tokens.cpu().float() - other.tokens).norm()
        assert float(gap / other.tokens.norm()) < 0.05
