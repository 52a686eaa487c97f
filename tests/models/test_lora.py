"""One module is the base, the student and its averages; what it adds goes into stock pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, SanaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.models.families import FAMILIES, Family, filled
from tests.pipelines.openuni import SIZE as OPENUNI
from tests.pipelines.qwen_image import SIZE as PIPELINE
from tests.pipelines.qwen_image import WIDTH as TEXT_WIDTH
from tests.pipelines.qwen_image import write_pipeline
from twinflow_train.batch import Condition, Velocity
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.errors import UserError
from twinflow_train.models.adapter import BASE, Assembly, NoAdapter
from twinflow_train.models.base import Model
from twinflow_train.models.lora import LoRA, LoraLinear, Switch, fingerprint
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.two_times import TargetTime
from twinflow_train.models.weights import LORA_FILE, Weights

NAMES = [name for name, family in FAMILIES.items() if family.small.lora_targets]
KINDS = ["average", "slow", "frozen"]
LORA = LoRA(rank=3, alpha=4.0)
every = pytest.mark.parametrize("name", NAMES)


def assembled(
    model: Model, weights: Weights, *, lora: LoRA = LORA, kinds: Sequence[str] = KINDS
) -> Assembly:
    """Build on the CPU what an engine would build, as at the start of a run."""
    (found,) = lora.assemble(model, kinds)
    found.net.to_empty(device="cpu")
    weights = lora.weights(weights, seed=0)
    with torch.no_grad():
        for _, name, p in found.tensors():
            p.copy_(weights.read(name, p.shape, 0, len(p)))
    return found


def loosened(found: Assembly) -> Assembly:
    """Move all that is not the base, each network's in its own way, as if they were trained."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for kind, _, p in found.tensors():
            if kind != BASE:
                p.add_(0.2 * torch.randn(p.shape, generator=noise))
    return found


@cache
def both(name: str, target_time: TargetTime = TargetTime.embedder) -> tuple[Family, Any, Assembly]:
    """Give a family, its stock model, and all networks with the same base."""
    family = FAMILIES[name]
    model = replace(family.small, target_time=target_time)
    return family, family.stock_model(), loosened(assembled(model, base_of(name)))


def base_of(name: str) -> Weights:
    family = FAMILIES[name]
    return family.small.stored_weights(family.folder)


def inputs(family: Family) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Give latents, times off the diagonal, and texts."""
    t, r = torch.tensor([1.0, 0.7, 0.4]), torch.tensor([0.0, 0.7, 0.1])
    return family.latents(3), t, r, family.texts(3, 3, 3)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Hold that two are equal but for rounding, which depends on where in memory weights lie."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def state(found: Assembly, kind: str) -> list[tuple[str, Tensor]]:
    return [(name, p.detach()) for owner, name, p in found.tensors() if owner == kind]


# The start


@every
@torch.no_grad()
def test_at_the_start_every_network_is_the_base_bit_for_bit(name: str) -> None:
    family = FAMILIES[name]
    found = assembled(family.small, base_of(name))
    x, t, r, cond = inputs(family)
    base, plain = found.networks[BASE](x, t, t, cond), filled(family.small, base_of(name))
    for kind in ("model", "average", "slow"):
        assert torch.equal(found.networks[kind](x, t, t, cond), base)
        close(found.networks[kind](x, t, r, cond), plain(x, t, r, cond))
    close(base, family.ask(family.stock_model(), x, t, cond))


def test_adapters_start_as_functions_of_the_seed_alone_with_the_spread_of_pefts() -> None:
    model = QwenImage(layers=1, heads=4, head_dim=64, text_width=8, rope=[16, 24, 24])
    lora, shape = LoRA(rank=32), torch.Size([32, 256])
    weights = lora.weights(model.random_weights(0), seed=5)
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    down = weights.read(name, shape, 0, 32)
    assert torch.equal(down[3:7], weights.read(name, shape, 3, 7))
    assert not torch.equal(
        down, lora.weights(model.random_weights(0), seed=6).read(name, shape, 0, 32)
    )
    up = weights.read(name.replace("lora_A", "lora_B"), torch.Size([256, 32]), 0, 256)
    assert not up.any()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = nn.Sequential(nn.Linear(256, 256))
        inject_adapter_in_model(LoraConfig(r=32, target_modules=["0"]), theirs)
        peft = theirs.get_parameter("0.lora_A.default.weight").detach()
    assert float(down.std()) == pytest.approx(float(peft.std()), rel=0.03)
    assert float(down.mean()) == pytest.approx(0.0, abs=0.01)


# The layer and its views


@torch.no_grad()
def test_the_layer_computes_what_pefts_does() -> None:
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(12, 9)
        switch = Switch()
        ours = LoraLinear(linear, rank=4, scale=2.5, kinds=("model", "slow"), switch=switch)
    theirs = nn.Sequential(nn.Linear(12, 9))
    theirs[0].load_state_dict(linear.state_dict())
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(config, theirs)
    for side in ("lora_A", "lora_B"):
        theirs.get_parameter(f"0.{side}.default.weight").copy_(
            ours.get_parameter(f"{side}.slow.weight")
        )
    with switch.to("slow"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    with switch.to(None):
        assert torch.equal(ours(x), linear(x))
    assert not torch.equal(ours(x), linear(x))


@every
@torch.no_grad()
def test_each_network_has_its_own_adapter_and_its_own_second_embedder(name: str) -> None:
    family, _, found = both(name)
    x, t, r, cond = inputs(family)
    answers = {kind: found.networks[kind](x, t, r, cond) for kind in ("model", "average", "slow")}
    assert not torch.equal(answers["model"], answers["average"])
    assert not torch.equal(answers["slow"], answers["average"])
    for kind, answer in answers.items():
        # The same numbers in a network of their own, whose only kind is the student.
        alone = assembled(family.small, base_of(name), kinds=())
        values = dict(state(found, kind))
        for owner, own, p in alone.tensors():
            if owner == "model":
                p.copy_(values[own])
        close(alone.net(x, t, r, cond), answer)


@every
@pytest.mark.parametrize("target_time", list(TargetTime))
@torch.no_grad()
def test_the_base_is_the_stock_network_at_t_whatever_was_trained(
    name: str, target_time: TargetTime
) -> None:
    family, stock, found = both(name, target_time)
    x, t, r, cond = inputs(family)
    own_clock = family.ask(stock, x, t, cond)
    close(found.networks[BASE](x, t, r, cond), own_clock)
    frozen = found.networks["frozen"](x, t, t, cond)
    if target_time is TargetTime.shift_all:  # as in the published runs
        close(frozen, family.ask(stock, x, t / 2, cond))
    else:
        close(frozen, own_clock)
    assert float((found.networks["model"](x, t, t, cond) - own_clock).abs().max()) > 0.01


@every
def test_only_what_the_student_adds_gets_a_gradient_and_all_of_it(name: str) -> None:
    family = FAMILIES[name]
    found = loosened(assembled(family.small, base_of(name)))
    x, t, r, cond = inputs(family)
    found.net(x, t, r, cond).square().mean().backward()
    got = {(kind, own) for kind, own, p in found.tensors() if p.grad is not None}
    assert got == {(kind, own) for kind, own, p in found.tensors() if kind == "model"}
    silent = {own for kind, own, p in found.tensors() if p.grad is not None and not p.grad.any()}
    # Queries of text tokens that nothing reads afterwards: zero, but there.
    assert all(".add_q_proj." in own for own in silent)


def test_blocks_that_are_computed_anew_are_the_students() -> None:
    """Views are asked between the forward and the backward pass, as every step does."""

    def gradients(every_n: int) -> dict[str, Tensor]:
        family = FAMILIES["qwen_image"]
        found = loosened(assembled(family.small, base_of("qwen_image")))
        found.net.train()
        if every_n:
            found.net.recompute(recompute_every(every_n, len(found.net.blocks)))
        x, t, r, cond = inputs(family)
        loss = found.net(x, t, r, cond).square().mean()
        with torch.no_grad():
            for view in found.networks.values():
                view(x, t, t, cond)
        loss.backward()
        return {own: p.grad for kind, own, p in found.tensors() if p.grad is not None}

    kept, anew = gradients(0), gradients(1)
    assert kept.keys() == anew.keys()
    assert all(torch.equal(kept[own], anew[own]) for own in kept)


@torch.no_grad()
def test_a_view_that_fails_leaves_the_student_behind() -> None:
    family, _, found = both("qwen_image")
    x, t, r, cond = inputs(family)
    before = found.net(x, t, r, cond)
    view: Velocity = found.networks["average"]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        view(x[:, :1], t, r, cond)
    assert torch.equal(found.net(x, t, r, cond), before)


@every
def test_the_base_is_there_once_and_the_rest_is_small(name: str) -> None:
    family, _, found = both(name)
    numbers = {kind: sum(p.numel() for _, p in state(found, kind)) for kind in ("model", BASE)}
    plain = dict(family.small.build().named_parameters())
    second = sum(p.numel() for own, p in plain.items() if ".embed_r." in own)
    assert numbers[BASE] == sum(p.numel() for p in plain.values()) - second
    total = sum(p.numel() for p in found.net.parameters())
    assert total == numbers[BASE] + 3 * numbers["model"]
    layers = [m for m in found.net.modules() if isinstance(m, LoraLinear)]
    adapters = sum(3 * (m.base_layer.in_features + m.base_layer.out_features) for m in layers)
    assert numbers["model"] == adapters + second
    names = {kind: [own for own, _ in state(found, kind)] for kind in ("model", "average", "slow")}
    assert names["model"] == names["average"] == names["slow"]


# Targets


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["to_q", "to_z"], "is named to_z; usual for this model are: to_q, to_k"),
        (["o_q"], "is named o_q"),  # only whole words of a name
        (["to_out"], "to_out is transformer_blocks.0.attn.to_out, a ModuleList, .* inside of it"),
        (["norm_q"], "norm_q is transformer_blocks.0.attn.norm_q, a RMSNorm, .*: none"),
        # Nothing reads the text after the last block.
        (["transformer_blocks.1.attn.to_add_out"], "an output depends on is named"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_by_name(targets: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"adapter.targets: .*{said}"):
        LoRA(rank=2, targets=targets).check(FAMILIES["qwen_image"].small)


def test_chosen_targets_are_all_that_is_adapted() -> None:
    lora = LoRA(rank=2, targets=["attn.to_q", "timestep_embedder.linear_1", "img_in"])
    found = assembled(FAMILIES["qwen_image"].small, base_of("qwen_image"), lora=lora)
    assert [own for own, _ in state(found, "model") if ".lora_A." in own] == [
        "time_text_embed.timestep_embedder.linear_1.lora_A.weight",
        "img_in.lora_A.weight",
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer_blocks.1.attn.to_q.lora_A.weight",
    ]
    x, t, r, cond = inputs(FAMILIES["qwen_image"])
    assert bool(loosened(found).net(x, t, r, cond).isfinite().all())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"rank": 0}, "adapter.rank is 0"), ({"alpha": 0.0}, "adapter.alpha is 0.0")],
)
def test_settings_without_sense_are_refused_by_key(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LoRA(**settings)


def test_a_family_without_a_lora_says_so() -> None:
    class Bare(QwenImage):
        lora_targets = ()

    with pytest.raises(UserError, match="adapter=lora: there is none for Bare"):
        LORA.check(Bare())


# What goes out


@every
@torch.no_grad()
def test_the_stock_class_with_the_exported_lora_is_our_network(name: str, tmp_path: Path) -> None:
    family, _, found = both(name)
    LORA.save(tmp_path, family.small, state(found, "average"), dtype=torch.float32)
    lora = load_file(tmp_path / LORA_FILE)
    stock = family.stock_model()
    stock.load_lora_adapter(lora)
    x, t, _, cond = inputs(family)
    ours = found.networks["average"](x, t, t, cond)
    close(family.ask(stock, x, t, cond), ours)
    assert float((ours - found.networks[BASE](x, t, t, cond)).abs().max()) > 0.01
    second = family.small.second.name
    beside = load_file(tmp_path / f"{second}.safetensors")
    assert {own.split(".")[0] for own in beside} == {second}
    assert len(beside) + len(lora) == len(state(found, "average"))


@torch.no_grad()
def test_the_stock_pipeline_loads_the_folder(tmp_path: Path) -> None:
    pipeline = QwenImagePipeline.from_pretrained(write_pipeline(tmp_path / "base"))
    base = PIPELINE.stored_weights(tmp_path / "base")
    found = loosened(assembled(PIPELINE, base))
    LORA.save(tmp_path / "lora", PIPELINE, state(found, "model"), dtype=torch.float32)
    x = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.6])
    cond = Condition(tokens=torch.randn(1, 3, TEXT_WIDTH, generator=torch.Generator()))
    ask = FAMILIES["qwen_image"].ask
    before = ask(pipeline.transformer, x, t, cond)
    close(before, found.networks[BASE](x, t, t, cond))
    pipeline.load_lora_weights(tmp_path / "lora")
    after = ask(pipeline.transformer, x, t, cond)
    close(after, found.net(x, t, t, cond))
    assert float((after - before).abs().max()) > 0.01


@torch.no_grad()
def test_with_shifted_times_the_stock_class_is_our_network_on_its_way_to_the_data(
    tmp_path: Path,
) -> None:
    """So one-step pictures come out of stock pipelines."""
    family, _, found = both("qwen_image", TargetTime.shift)
    model = replace(family.small, target_time=TargetTime.shift)
    LORA.save(tmp_path, model, state(found, "model"), dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    stock = family.stock_model()
    stock.load_lora_adapter(load_file(tmp_path / LORA_FILE))
    x, t, _, cond = inputs(family)
    close(family.ask(stock, x, t, cond), found.net(x, t, 0 * t, cond))


@every
@torch.no_grad()
def test_merged_it_is_one_network_for_us_and_for_the_stock_class(name: str, tmp_path: Path) -> None:
    family, _, found = both(name)
    merged = LORA.merged(family.small, base_of(name), state(found, "slow"))
    NoAdapter().save(tmp_path, family.small, merged, dtype=torch.float32)
    x, t, r, cond = inputs(family)
    whole = filled(family.small, family.small.stored_weights(tmp_path))
    ours = found.networks["slow"](x, t, r, cond)
    close(whole(x, t, r, cond), ours)
    stock = family.stock.from_pretrained(tmp_path / "transformer")
    ours = found.networks["slow"](x, t, t, cond)
    close(family.ask(stock, x, t, cond), ours)


def test_a_lora_is_no_network_to_start_from(tmp_path: Path) -> None:
    family, _, found = both("qwen_image")
    LORA.save(tmp_path, family.small, state(found, "model"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"holds a LoRA .*export RUN --merge") as refused:
        family.small.stored_weights(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_openuni_gives_a_lora_for_its_sana(tmp_path: Path) -> None:
    found = loosened(assembled(OPENUNI, OPENUNI.random_weights(0)))
    LORA.save(tmp_path, OPENUNI, state(found, "model"), dtype=torch.float32)
    lora = load_file(tmp_path / LORA_FILE)
    theirs = [
        f"transformer.{own}"
        for own, module in SanaTransformer2DModel(**OPENUNI.stock_arguments()).named_modules()
        if own.endswith(OPENUNI.lora_targets)
    ]
    sides = ("lora_A.weight", "lora_B.weight")
    assert sorted(lora) == sorted(f"{own}.{side}" for own in theirs for side in sides)
    assert {path.name for path in tmp_path.iterdir()} == {
        LORA_FILE,
        "transformer.time_embed_2.safetensors",
    }
    merged = dict(LORA.merged(OPENUNI, OPENUNI.random_weights(0), state(found, "model")))
    assert merged.keys() == set(OPENUNI.build().stored_names().values())


def test_half_precision_is_a_rounding(tmp_path: Path) -> None:
    family, _, found = both("qwen_image")
    for name, dtype in {"half": torch.bfloat16, "whole": torch.float32}.items():
        LORA.save(tmp_path / name, family.small, state(found, "model"), dtype=dtype)
    for file in (LORA_FILE, "time_text_embed_2.safetensors"):
        half, whole = load_file(tmp_path / "half" / file), load_file(tmp_path / "whole" / file)
        assert all(torch.equal(half[own], whole[own].bfloat16()) for own in whole)


def test_a_base_is_known_by_its_numbers_and_not_by_its_files(tmp_path: Path) -> None:
    family = FAMILIES["qwen_image"]
    stock = family.stock_model()
    stock.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    with torch.no_grad():
        stock.proj_out.weight[0, 0] += 1e-3
    stock.save_pretrained(tmp_path / "other")
    first, parts, other = (
        fingerprint(family.small, family.small.stored_weights(folder))
        for folder in (family.folder, tmp_path / "parts", tmp_path / "other")
    )
    assert first == parts
    assert first != other
