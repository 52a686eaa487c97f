"""TwinFlowPipeline on tiny pipelines in the released formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.pipelines.qwen_image import SIZE, write_pipeline
from tests.pipelines.qwen_image_edit import EDIT_SIZE, write_edit_pipeline
from twinflow_train.batch import Condition, Embedding
from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import FEW, Sampler, Style, published, sample
from twinflow_train.models.loading import filled
from twinflow_train.models.qwen_codec import QwenImageEncoders
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.qwen_image_edit import QwenImageEdit
from twinflow_train.models.weights import RandomWeights, save_folder
from twinflow_train.rng import generator
from twinflow_train.sampling import TwinFlowPipeline
from twinflow_train.sampling.origin import BASE, find

FILE = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
SMALL: Any = {"height": 32, "width": 48}
PROMPTS = ["a red apple", "the color and the size of objects", "text"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in many steps, as it is released."""
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def released(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline whose transformer has a second embedder, as the published weights do."""
    folder = tmp_path_factory.mktemp("released") / "twinflow"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer"))
    weights = RandomWeights(0, lambda name, shape: ("normal", 0.2), {})
    names = SIZE.build().stored_names()
    net = SIZE.build()
    tensors = (
        (name, weights.read(name, net.get_parameter(own).shape, 0, len(net.get_parameter(own))))
        for own, name in names.items()
    )
    save_folder(folder / "transformer", SIZE.stock_config(), tensors)
    return folder


@pytest.fixture(scope="module")
def pipeline(released: Path) -> TwinFlowPipeline:
    return TwinFlowPipeline.from_pretrained(str(released), model=SIZE, device="cpu")


def test_published_names_make_a_few_step_model(released: Path, pipeline: TwinFlowPipeline) -> None:
    (file,) = (released / "transformer").glob("*.safetensors")
    second = {name for name in load_file(file) if name.startswith("time_text_embed_2.")}
    assert second == {
        f"time_text_embed_2.timestep_embedder.linear_{n}.{kind}"
        for n in (1, 2)
        for kind in ("weight", "bias")
    }
    assert pipeline.origin.samplers == tuple(FEW.values())
    assert pipeline("a", **SMALL).sampler == FEW[1]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_pictures_are_those_of_the_sampler(
    released: Path, pipeline: TwinFlowPipeline, steps: int
) -> None:
    drawn = pipeline(PROMPTS, num_inference_steps=steps, seed=3, **SMALL)
    net = filled(SIZE, SIZE.stored_weights(released), device=CPU, dtype=torch.float32)
    codec = pipeline.codec
    for number, prompt in enumerate(PROMPTS):
        cond = Condition.of(codec.embed([prompt], at_once=1))
        shape = (1, *codec.latent_shape(32, 48))
        start = torch.randn(shape, generator=generator("sample", 3, number, "start"))

        def eps(step: int, number: int = number, shape: tuple[int, ...] = shape) -> torch.Tensor:
            return torch.randn(shape, generator=generator("sample", 3, number, "eps", step))

        wanted = codec.decode(sample(net, start, cond, FEW[steps], eps=eps))[0]
        torch.testing.assert_close(drawn.tensors[number], wanted, atol=1e-4, rtol=0)


def test_a_picture_depends_on_its_number_and_seed_alone(pipeline: TwinFlowPipeline) -> None:
    first = pipeline(PROMPTS, num_images_per_prompt=2, batch=6, **SMALL).tensors
    assert len(first) == 6
    for batch in (1, 4):
        again = pipeline(PROMPTS, num_images_per_prompt=2, batch=batch, **SMALL).tensors
        torch.testing.assert_close(again, first, atol=1e-4, rtol=0)
    fewer = pipeline(PROMPTS[:1], num_images_per_prompt=2, **SMALL).tensors
    torch.testing.assert_close(fewer, first[:2], atol=1e-4, rtol=0)
    assert (first[0] - first[1]).abs().mean() > 1e-3
    other = pipeline(PROMPTS, num_images_per_prompt=2, seed=1, **SMALL).tensors
    assert (other - first).abs().mean() > 1e-3


def test_a_base_is_drawn_in_many_steps_with_guidance(base: Path) -> None:
    pipeline = TwinFlowPipeline.from_pretrained(str(base), model=SIZE)
    assert pipeline.origin.samplers == ()
    assert pipeline.origin.sampler() == BASE
    assert pipeline.origin.sampler(steps=8).steps == 8
    assert pipeline("a", num_inference_steps=2, **SMALL).sampler.guidance == BASE.guidance
    one = pipeline("a", num_inference_steps=1, style="few", **SMALL)
    assert one.sampler == FEW[1]


def test_encoders_may_stand_elsewhere(released: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(released / "transformer", tmp_path / "transformer")
    whole = TwinFlowPipeline.from_pretrained(str(released), model=SIZE)("a", **SMALL)
    parts = TwinFlowPipeline.from_pretrained(str(tmp_path), model=SIZE, encoders=str(base))
    assert torch.equal(parts("a", **SMALL).tensors, whole.tensors)


def test_the_parts_of_a_released_folder_load_in_plain_diffusers(released: Path) -> None:
    """The stock class leaves the second embedder out: what it draws is the base's."""
    stock = QwenImagePipeline.from_pretrained(released)
    assert isinstance(stock.transformer, QwenImageTransformer2DModel)


def test_images_are_eight_bits_of_the_tensors(pipeline: TwinFlowPipeline) -> None:
    drawn = pipeline("a", **SMALL)
    (image,) = drawn.images
    assert (image.mode, image.size) == ("RGB", (48, 32))
    level = ((drawn.tensors[0, :, 5, 7].clamp(-1, 1) + 1) * 127.5).round()
    assert image.getpixel((7, 5)) == tuple(map(int, level.tolist()))


def test_settings_are_chosen_by_style_and_steps(pipeline: TwinFlowPipeline) -> None:
    choose = pipeline.origin.sampler
    assert choose(steps=2) == FEW[2]
    assert choose(style=Style.any, steps=4) == published(Style.any, 4)
    assert choose(steps=3) == Sampler(steps=3, stochasticity=1.0, end_gap=0.5)
    assert choose(style=Style.multi).style is Style.multi


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"height": 40, "width": 32}, "height is 40; it must be a multiple of 16, for instance 32"),
        ({"height": 32, "width": 0}, "width is 0"),
        ({"height": -16, "width": 16}, "height is -16"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(
    pipeline: TwinFlowPipeline, size: dict[str, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        pipeline("a", **size)  # type: ignore[arg-type]


def test_any_size_of_whole_tokens_is_drawn(pipeline: TwinFlowPipeline) -> None:
    for height, width in ((16, 16), (16, 64), (64, 48)):
        assert pipeline("a", height=height, width=width).tensors.shape == (1, 3, height, width)


@pytest.mark.parametrize("prompts", [[], "", ["a", " "]])
def test_no_prompt_is_refused(pipeline: TwinFlowPipeline, prompts: str | list[str]) -> None:
    with pytest.raises(UserError, match="prompts: at least one is wanted"):
        pipeline(prompts, **SMALL)


def test_what_is_no_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"from: .*nowhere does not exist"):
        TwinFlowPipeline.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"QwenImageTransformer2DModel of no released size"):
        TwinFlowPipeline.from_pretrained(str(base))
    with pytest.raises(UserError, match=r"from: Nobody/nothing is neither a folder here"):
        TwinFlowPipeline.from_pretrained("Nobody/nothing")
    other = json.loads((base / "transformer" / "config.json").read_text()) | {"num_layers": 3}
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "other" / "transformer" / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"num_layers is 3, the configuration's is 2"):
        TwinFlowPipeline.from_pretrained(str(tmp_path / "other"), model=SIZE)


# Editing


@pytest.fixture(scope="module")
def editing(tmp_path_factory: pytest.TempPathFactory) -> TwinFlowPipeline:
    folder = write_edit_pipeline(tmp_path_factory.mktemp("edit") / "tiny")
    return TwinFlowPipeline.from_pretrained(str(folder), model=EDIT_SIZE, device="cpu")


def test_pictures_are_edited_from_files_and_from_memory(
    editing: TwinFlowPipeline, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (50, 40), "red")
    picture.save(tmp_path / "red.png")
    ask: Any = {"num_inference_steps": 1, "style": "few", **SMALL}
    drawn = editing("make it blue", pictures=[tmp_path / "red.png"], **ask)
    assert drawn.tensors.shape == (1, 3, 32, 48)
    again = editing("make it blue", pictures=[picture], **ask)
    assert torch.equal(drawn.tensors, again.tensors)
    other = editing("make it blue", pictures=[Image.new("RGB", (50, 40), "green")], **ask)
    assert not torch.equal(drawn.tensors, other.tensors)
    two = editing(["a", "b"], pictures=[picture, tmp_path / "red.png"], **ask)
    assert len(two.tensors) == 2
    guided = editing("make it blue", pictures=[picture], num_inference_steps=2, **SMALL)
    assert guided.sampler.guidance == BASE.guidance
    assert bool(guided.tensors.isfinite().all())


def test_who_edits_wants_pictures_and_who_does_not_takes_none(
    editing: TwinFlowPipeline, pipeline: TwinFlowPipeline, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="pictures: this model edits"):
        editing("a", **SMALL)
    with pytest.raises(UserError, match="pictures: this model takes none"):
        pipeline("a", pictures=[Image.new("RGB", (50, 40))], **SMALL)
    (tmp_path / "text.png").write_text("no picture")
    for file in ("text.png", "nowhere.png"):
        with pytest.raises(UserError, match=rf"pictures: .*{file} cannot be used"):
            editing("a", pictures=[tmp_path / file], **SMALL)


def test_released_folders_are_told_apart(tmp_path: Path) -> None:
    assert QwenImage().stock_config() == QwenImageEdit().stock_config()  # up to release 2509
    for kind, model in {
        "QwenImagePipeline": QwenImage(),
        "QwenImageEditPipeline": QwenImageEdit(),
        "QwenImageEditPlusPipeline": QwenImageEdit(),
    }.items():
        folder = tmp_path / kind
        (folder / "transformer").mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        save_file({"proj_out.bias": torch.zeros(1)}, folder / "transformer" / FILE)
        said = json.dumps(model.stock_config())
        (folder / "transformer" / "config.json").write_text(said)
        found = find(str(folder))
        assert (type(found.model), found.samplers) == (type(model), ())
        assert isinstance(found.encoders, QwenImageEncoders)
        assert found.encoders.edits == isinstance(model, QwenImageEdit)


# Places that are not whole


def test_a_prompt_that_is_too_long_is_refused_by_its_tokens(pipeline: TwinFlowPipeline) -> None:
    long = "red " * 1100
    with pytest.raises(UserError, match=r"prompts: 'red red .* tokens, and the text encoder reads"):
        pipeline(["red", long], **SMALL)
    pipeline.check(["red", long[:2000]])


def test_equal_prompts_are_encoded_once(
    pipeline: TwinFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    embed = pipeline.codec.embed

    def counted(prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        asked.extend(prompts)
        return embed(prompts, at_once=at_once)

    monkeypatch.setattr(pipeline.codec, "embed", counted)
    found = pipeline.embed(["text", "a red apple", "text"])
    assert asked == ["text", "a red apple"]
    alone = pipeline.embed(["a red apple"])
    assert torch.equal(found.tokens[0], found.tokens[2])
    assert torch.equal(found.tokens[1][: alone.tokens.shape[1]], alone.tokens[0])


def write_export(folder: Path, source: Path) -> Path:
    """Write what an export holds beside the weights."""
    shutil.copytree(source / "transformer", folder / "transformer")
    settings = [vars(sampler) | {"style": sampler.style.name} for sampler in FEW.values()]
    (folder / "sampler.json").write_text(json.dumps(settings))
    model = {k: v for k, v in vars(SIZE).items() if k != "target_time"} | {"_type": "QwenImage"}
    (folder / "model.json").write_text(json.dumps({"model": model, "encoder": "a/b"} | REVISION))
    return folder


REVISION = {"revision": "sha256:0", "null_prompt": ""}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model.json", "{"), ("model.json", "[]"), ("model.json", "{}"),
        ("sampler.json", "{"), ("sampler.json", '[{"style": "few", "speed": 1}]'),
        ("sampler.json", "[{}]"), ("transformer/config.json", "[]"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", "{}"),
        ("model_index.json", "{"), ("model_index.json", "[]"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(released: Path, tmp_path: Path, file: str, text: str) -> None:
    folder = write_export(tmp_path / "export", released)
    assert find(str(folder)).samplers == tuple(FEW.values())
    (folder / file).write_text(text)
    if file == "model_index.json":
        (folder / "model.json").unlink()
    with pytest.raises(UserError, match=r"damaged|other model"):
        find(str(folder)).network(device=CPU, dtype=torch.float32)


def test_of_a_lora_run_the_merged_export_is_taken(released: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    merged = write_export(tmp_path / "export-00000002-ema-merged", released)
    lora = write_export(tmp_path / "export", released)
    shutil.rmtree(lora / "transformer")
    assert find(str(tmp_path)).folder == merged
