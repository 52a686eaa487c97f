"""Weights in and out: random, from stock folders, and back into the stock class."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from tests.models.tools import SMALL, filled, latents, save_stock, stock_model, texts
from twinflow_train.errors import UserError
from twinflow_train.models import weights as weight_files
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.two_times import TargetTime
from twinflow_train.models.weights import RandomWeights, save_folder

NAME = "transformer_blocks.1.attn.to_q.weight"
PART = "diffusion_pytorch_model.safetensors"
INDEX = f"{PART}.index.json"


def rule(name: str, shape: torch.Size) -> tuple[str, float]:
    return ("constant", 3.0) if len(shape) == 1 else ("normal", 0.5)


def random_weights(seed: int = 0) -> RandomWeights:
    return RandomWeights(seed, rule, {"second.": "first."})


def test_random_values_are_a_function_of_seed_and_name() -> None:
    shape = torch.Size([7, 5])
    first = random_weights().read("first.weight", shape, 0, 7)
    assert torch.equal(random_weights().read("first.weight", shape, 0, 7), first)
    assert not torch.equal(random_weights(1).read("first.weight", shape, 0, 7), first)
    assert not torch.equal(random_weights().read("other.weight", shape, 0, 7), first)


def test_random_rows_are_rows_of_the_whole() -> None:
    shape = torch.Size([7, 5, 2])
    whole = random_weights().read("first.weight", shape, 0, 7)
    for start, stop in ((0, 3), (3, 7), (6, 7), (7, 7)):
        rows = random_weights().read("first.weight", shape, start, stop)
        assert torch.equal(rows, whole[start:stop])


def test_random_values_obey_their_rule() -> None:
    wide = random_weights().read("first.weight", torch.Size([200, 200]), 0, 200)
    assert float(wide.std()) == pytest.approx(0.5, rel=0.02)
    assert float(wide.mean()) == pytest.approx(0, abs=0.01)
    bias = random_weights().read("first.bias", torch.Size([6]), 2, 5)
    assert torch.equal(bias, torch.full((3,), 3.0))


def test_an_alias_has_the_values_of_the_other_name() -> None:
    shape = torch.Size([4, 3])
    second = random_weights().read("second.weight", shape, 1, 3)
    assert torch.equal(second, random_weights().read("first.weight", shape, 1, 3))


@pytest.mark.parametrize("inner", ["", "transformer"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_what_the_stock_class_saved_is_read(tmp_path: Path, inner: str, shard: str) -> None:
    stock = save_stock(tmp_path / inner, max_shard_size=shard)
    files = list((tmp_path / inner).glob("*.safetensors"))
    assert (len(files) == 1) == (shard == "10GB")
    weights = SMALL.stored_weights(tmp_path)
    for name, tensor in stock.state_dict().items():
        rows = len(tensor)
        assert torch.equal(weights.read(name, tensor.shape, 0, rows), tensor)
        middle = weights.read(name, tensor.shape, rows // 3, rows // 2)
        assert torch.equal(middle, tensor[rows // 3 : rows // 2])


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_files_of_another_type_are_read_where_there_are_no_plain_ones(
    tmp_path: Path, shard: str
) -> None:
    stock = stock_model().bfloat16()
    stock.save_pretrained(tmp_path, variant="bf16", max_shard_size=shard)
    assert all("bf16" in file.name for file in tmp_path.glob("*.safetensors"))
    weights = SMALL.stored_weights(tmp_path)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(weights.read(name, tensor.shape, 0, len(tensor)), tensor)
    plain = save_stock(tmp_path).state_dict()[NAME]
    there = SMALL.stored_weights(tmp_path).read(NAME, plain.shape, 0, len(plain))
    assert torch.equal(there, plain)


def test_a_missing_second_embedder_starts_as_a_copy_of_the_first(tmp_path: Path) -> None:
    stock = save_stock(tmp_path)
    embedder = filled(SMALL.stored_weights(tmp_path)).stock.time_text_embed
    theirs = stock.time_text_embed.state_dict()
    for ours in (embedder.embed.state_dict(), embedder.embed_r.state_dict()):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_embedder_that_is_there_is_read(tmp_path: Path) -> None:
    save_stock(tmp_path)
    tensors = load_file(tmp_path / PART)
    second = {
        name.replace("time_text_embed.", "time_text_embed_2."): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("time_text_embed.")
    }
    save_file(tensors | second, tmp_path / PART)
    embedder = filled(SMALL.stored_weights(tmp_path)).stock.time_text_embed
    for first, other in zip(
        embedder.embed.parameters(), embedder.embed_r.parameters(), strict=True
    ):
        assert torch.equal(other, first + 1)


def read_all(folder: Path, size: QwenImage = SMALL) -> None:
    filled(size.stored_weights(folder), size)


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / PART)
    del tensors[NAME]
    save_file(tensors, folder / PART)


def with_a_wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / PART)
    tensors[NAME] = tensors[NAME][:-1].clone()
    save_file(tensors, folder / PART)


def truncated(folder: Path) -> None:
    whole = (folder / PART).read_bytes()
    (folder / PART).write_bytes(whole[: len(whole) // 2])


def half_a_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / PART).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_a_tensor, f"no tensor '{NAME}'"),
        (with_a_wrong_shape, f"{NAME} .* shape \\(15, 16\\), .* wants \\(16, 16\\)"),
        (without_weights, PART),
        (truncated, PART),
        (without_config, "config.json"),
        (half_a_config, "config.json"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    save_stock(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        read_all(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_a_part_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    save_stock(tmp_path, max_shard_size="20KB")
    part = sorted(tmp_path.glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(UserError, match=part.name):
        read_all(tmp_path)


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        SMALL.stored_weights(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_layers": 3}, "num_layers is 3, .* is 2"),
        ({"num_attention_heads": 1}, "num_attention_heads is 1, .* is 2"),
        ({"axes_dims_rope": (2, 4, 2)}, "axes_dims_rope"),
        # The same tensors, another function.
        ({"zero_cond_t": True}, "zero_cond_t"),
    ],
)
def test_weights_of_another_model_are_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    stock_model(**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=key) as refused:
        SMALL.stored_weights(tmp_path)
    assert str(tmp_path) in str(refused.value)


def exported(folder: Path, size: QwenImage) -> None:
    """Write a network's weights as a run's export does."""
    net = filled(size.random_weights(0), size)
    tensors = {net.stored_name(name): p.detach() for name, p in net.named_parameters()}
    save_folder(folder, size.config(), iter(tensors.items()))


def test_an_export_says_how_its_target_time_enters(tmp_path: Path) -> None:
    shifted = replace(SMALL, target_time=TargetTime.shift)
    exported(tmp_path, shifted)
    with pytest.raises(UserError, match="target_time is shift, the configuration's is embedder"):
        SMALL.stored_weights(tmp_path)
    for kind in (TargetTime.shift, TargetTime.shift_all):
        assert replace(SMALL, target_time=kind).stored_weights(tmp_path)


def test_tensors_that_the_model_has_no_place_for_are_refused_by_name(tmp_path: Path) -> None:
    exported(tmp_path, SMALL)
    said = r"4 tensors that .*: time_text_embed_2\..*model\.target_time"
    with pytest.raises(UserError, match=said) as refused:
        replace(SMALL, target_time=TargetTime.shift).stored_weights(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_weights_of_another_class_are_refused(tmp_path: Path) -> None:
    save_stock(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["_class_name"] = "FluxTransformer2DModel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="FluxTransformer2DModel"):
        SMALL.stored_weights(tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_what_we_save_loads_in_the_stock_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    if several:
        monkeypatch.setattr(weight_files, "SHARD_BYTES", 20_000)
    save_stock(tmp_path / "from")
    net = filled(SMALL.stored_weights(tmp_path / "from"))
    tensors = {net.stored_name(name): p.detach() + 0.5 for name, p in net.named_parameters()}
    save_folder(tmp_path / "to", SMALL.config(), iter(tensors.items()))

    parts = sorted((tmp_path / "to").glob("*.safetensors"))
    assert (len(parts) > 2) == several
    assert (tmp_path / "to" / INDEX).is_file() == several
    assert all(part.stat().st_size < 40_000 for part in parts if several)

    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "to")
    extra = {name for name in tensors if name.startswith("time_text_embed_2.")}
    theirs = loaded.state_dict()
    assert theirs.keys() == tensors.keys() - extra
    assert extra
    assert all(torch.equal(theirs[name], tensors[name]) for name in theirs)

    again = filled(SMALL.stored_weights(tmp_path / "to"))
    for name, p in again.named_parameters():
        assert torch.equal(p, tensors[again.stored_name(name)])
    t = torch.tensor([0.9])
    assert bool(again(latents(1), t, t / 2, texts(3)).isfinite().all())


def test_an_export_over_another_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {name: p.shape for name, p in stock_model().named_parameters()}
    with monkeypatch.context() as small_parts:
        small_parts.setattr(weight_files, "SHARD_BYTES", 20_000)
        save_folder(tmp_path, SMALL.config(), ((n, torch.zeros(s)) for n, s in shapes.items()))
    save_folder(tmp_path, SMALL.config(), ((n, torch.ones(s)) for n, s in shapes.items()))
    weights = SMALL.stored_weights(tmp_path)
    assert bool((weights.read(NAME, shapes[NAME], 0, 16) == 1).all())
