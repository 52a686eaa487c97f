"""Qwen-Image's codec against the stock pipelines, on a tiny pipeline in the released format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImagePipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.tools import check_length
from tests.pipelines.qwen_image import PREFIX, write_pipeline
from twinflow_train.errors import UserError
from twinflow_train.models.qwen_codec import PARTS, QwenImageCodec, QwenImageEncoders

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "", "the color and the size of {} objects, 90% and more", "text: <b>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def stock(folder: Path) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def codec(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> QwenImageCodec:
    """Open a copy without what a codec does not need."""
    copy = tmp_path_factory.mktemp("parts") / "encoders"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("transformer", "scheduler"))
    encoders = QwenImageEncoders(path=str(copy))
    return encoders.open(encoders.find(), CPU)


def pictures(rows: int, height: int = 48, width: int = 32) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_tiny_template_ends_where_the_released_one_does(stock: QwenImagePipeline) -> None:
    """Else the stock pipeline would cut elsewhere, and the tests would hold of nothing real."""
    assert stock.prompt_template_encode.startswith(PREFIX)
    assert len(stock.tokenizer(PREFIX).input_ids) == stock.prompt_template_encode_start_idx


@torch.no_grad()
def test_a_prompt_is_embedded_as_the_stock_pipeline_embeds_it(
    codec: QwenImageCodec, stock: QwenImagePipeline
) -> None:
    for prompt, ours in zip(PROMPTS, codec.embed(PROMPTS, at_once=1), strict=True):
        theirs, mask = stock.encode_prompt(prompt)
        assert mask is None
        assert torch.equal(ours.tokens, theirs[0])
        assert ours.pooled is None


@torch.no_grad()
def test_prompts_that_are_encoded_together_come_unpadded_and_in_order(
    codec: QwenImageCodec, stock: QwenImagePipeline
) -> None:
    theirs, mask = stock.encode_prompt(PROMPTS)
    assert mask is not None
    for at_once in (2, 3, 4, 9):
        for row, ours in enumerate(codec.embed(PROMPTS, at_once=at_once)):
            assert ours.tokens.shape == (int(mask[row].sum()), codec.text_width)
            torch.testing.assert_close(ours.tokens, theirs[row, : len(ours)], rtol=1e-4, atol=1e-5)
    assert codec.embed([], at_once=4) == []


def test_prompts_of_like_length_share_their_padding(codec: QwenImageCodec) -> None:
    shapes: list[tuple[int, ...]] = []
    encoder = codec._pipeline.text_encoder
    hook = encoder.register_forward_pre_hook(
        lambda module, args, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    codec.embed(["the " * 60, "the", "the " * 60, "the"], at_once=2)
    hook.remove()
    assert [rows for rows, _ in shapes] == [2, 2]
    assert shapes[1][1] - shapes[0][1] >= 59


def test_a_very_long_prompt_is_cut_as_the_stock_pipeline_cuts_it(codec: QwenImageCodec) -> None:
    assert [len(text) for text in codec.embed(["the " * 1500], at_once=1)] == [1024]


def test_it_counts_what_of_a_prompt_is_read(codec: QwenImageCodec) -> None:
    check_length(codec, 1024)


@torch.no_grad()
def test_latents_are_decoded_as_the_stock_pipeline_decodes_them(
    codec: QwenImageCodec, stock: QwenImagePipeline
) -> None:
    def run(output: str) -> Tensor:
        noise = torch.Generator().manual_seed(1)
        images: Tensor = stock("a", height=48, width=32, num_inference_steps=2, generator=noise,
                               output_type=output).images  # fmt: skip
        return images

    tokens, image = run("latent"), run("pt")
    latents = stock._unpack_latents(tokens, 48, 32, stock.vae_scale_factor)[:, :, 0]
    ours = codec.decode(latents)
    assert torch.equal((ours * 0.5 + 0.5).clamp(0, 1), image)
    assert float(image.std()) > 0.01


@torch.no_grad()
def test_latents_are_the_mean_normalised_as_the_stock_edit_pipeline_does(
    codec: QwenImageCodec, stock: QwenImagePipeline
) -> None:
    edit = QwenImageEditPipeline(**stock.components, processor=None)
    images = pictures(2)
    generator = torch.Generator()
    theirs = [edit._encode_vae_image(image[None, :, None], generator) for image in images]
    ours = codec.encode(images)
    assert ours.shape == (2, *codec.latent_shape(48, 32)) == (2, 16, 6, 4)
    torch.testing.assert_close(ours, torch.cat(theirs)[:, :, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, codec.encode(images))


def test_sizes_are_multiples_of_what_one_token_covers(codec: QwenImageCodec) -> None:
    assert codec.multiple == 16
    assert codec.null_prompt == QwenImageEncoders.null_prompt == "Generate an image."


def test_the_weights_are_identified_by_what_they_are(folder: Path, tmp_path: Path) -> None:
    first = QwenImageEncoders(path=str(folder)).find()
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    found = QwenImageEncoders(path=str(same)).find()
    assert (found.name, found.commit) == ("same", None)
    assert found.revision == first.revision
    assert first.revision.startswith("sha256:")
    path = same / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, path, metadata={"format": "pt"})
    assert QwenImageEncoders(path=str(same)).find().revision != first.revision


def test_a_repository_in_the_cache_is_found_offline_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--Some--Model"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = QwenImageEncoders(path="Some/Model").find()
    assert (found.name, found.revision) == ("Some/Model", commit)
    assert QwenImageEncoders(path="Some/Model", revision=commit).find() == found
    with pytest.raises(UserError, match=r"hf download Some/Model .*--revision other --local-dir"):
        QwenImageEncoders(path="Some/Model", revision="other").find()


def test_what_is_not_here_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        QwenImageEncoders().find()
    said = str(error.value)
    assert said.startswith("encoders.path: Qwen/Qwen-Image is neither a folder here")
    for part in PARTS:
        assert f"'{part}/*'" in said
    assert "give encoders.path=FOLDER" in said
    with pytest.raises(UserError, match=r"encoders\.path: the pipeline folder .* does not exist"):
        QwenImageEncoders(path=str(tmp_path / "nowhere")).find()
    with pytest.raises(UserError, match=r"encoders\.revision is main, but .* is a folder"):
        QwenImageEncoders(path=str(tmp_path), revision="main").find()


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        (["vae/diffusion_pytorch_model.safetensors"], "vae/diffusion_pytorch_model.safetensors"),
        (["text_encoder"], "text_encoder/config.json, text_encoder/model.safetensors"),
        (["tokenizer/tokenizer.json"], "tokenizer/vocab.json, tokenizer/merges.txt"),
        (["model_index.json"], "model_index.json"),
    ],
)
def test_a_folder_that_is_not_whole_names_what_it_lacks(
    folder: Path, tmp_path: Path, remove: list[str], named: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in remove:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"it lacks {named}; download model_index.json 'vae"):
        QwenImageEncoders(path=str(copy)).find()


def test_missing_parts_of_split_weights_are_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    inner = copy / "text_encoder"
    (inner / "model.safetensors").rename(inner / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = inner / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"lacks text_encoder/model-00002-of-00002.safetensors;"):
        QwenImageEncoders(path=str(copy)).find()
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json is damaged"):
        QwenImageEncoders(path=str(copy)).find()


def test_another_familys_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = copy / "model_index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps(said | {"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(UserError, match=r"the vae of .* is AutoencoderKL, not Auto"):
        QwenImageEncoders(path=str(copy)).find()
    index.write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"model_index\.json is damaged"):
        QwenImageEncoders(path=str(copy)).find()


@pytest.mark.parametrize(
    "name", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_damaged_weights_are_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes()[:5000])
    encoders = QwenImageEncoders(path=str(copy))
    with pytest.raises(UserError, match=r"encoders\.path: .* cannot be loaded .*download it again"):
        encoders.open(encoders.find(), CPU)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_it_computes_in_bfloat16_near_the_cpu(codec: QwenImageCodec, folder: Path) -> None:
    encoders = QwenImageEncoders(path=str(folder))
    on_gpu = encoders.open(encoders.find(), torch.device("cuda", 0))
    images = pictures(2)
    latents = on_gpu.encode(images)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.cpu(), codec.encode(images), rtol=0.1, atol=0.05)
    decoded = on_gpu.decode(latents).cpu()
    torch.testing.assert_close(decoded, codec.decode(latents.cpu()), rtol=0.1, atol=0.1)
    texts = [one.tokens for one in on_gpu.embed(PROMPTS, at_once=4)]
    assert {text.dtype for text in texts} == {torch.bfloat16}
    for text, own in zip(texts, codec.embed(PROMPTS, at_once=4), strict=True):
        gap = (text.cpu().float() - own.tokens).norm()
        assert float(gap / own.tokens.norm()) < 0.05
