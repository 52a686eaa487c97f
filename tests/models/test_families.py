"""What every family promises: the stock network behind one convention, plus a second time."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.families import FAMILIES, HEIGHT, WIDTH, Family, filled
from twinflow_train.batch import Condition
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.errors import UserError
from twinflow_train.flow.path import interpolate, jump
from twinflow_train.models.base import VelocityNet
from twinflow_train.models.two_times import TargetTime

NAMES = list(FAMILIES)
FILE = "diffusion_pytorch_model.safetensors"
every = pytest.mark.parametrize("name", NAMES)


@cache
def both(name: str) -> tuple[Family, Any, VelocityNet]:
    """Give a family, its stock model, and our network with the same weights."""
    family = FAMILIES[name]
    return family, family.stock_model(), family.net()


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest difference of each row."""
    return (one - other).abs().flatten(1).max(1).values


# Times, signs and scales


@every
@torch.no_grad()
def test_at_r_equal_t_it_is_the_stock_network_bit_for_bit(name: str) -> None:
    family, stock, net = both(name)
    x, t = family.latents(4), torch.tensor([1.0, 0.123456789, 0.5, 0.0])
    for cond in (family.texts(3, 3, 3, 3), family.texts(3, 1, 40, 2)):
        ours = net(x, t, t, cond)
        assert torch.equal(ours, family.ask(stock, x, t, cond))
        assert bool((ours.flatten(1).std(1) > 0.01).all())


@every
@torch.no_grad()
def test_euler_steps_are_those_of_the_stock_schedulers(name: str) -> None:
    family, stock, net = both(name)
    data, noise, cond = family.latents(2, 3), family.latents(2, 4), family.texts(3, 3)
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[0.9, 0.6, 0.2])
    family.scheduler.set_timesteps(4)
    for scheduler in (euler, family.scheduler):
        sigmas = scheduler.sigmas.tolist()
        start = interpolate(data, noise, torch.full((2,), sigmas[0]))
        theirs = ours = start
        for i, timestep in enumerate(scheduler.timesteps):
            now, then = (torch.full((2,), sigma) for sigma in sigmas[i : i + 2])
            velocity = family.ask(stock, theirs, now, cond)
            theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
            ours = jump(ours, net(ours, now, now, cond), now, then)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (distance(ours, start) > 0.05).all()


@every
@torch.no_grad()
def test_the_second_time_matters_where_it_differs_from_the_first(name: str) -> None:
    family, _, net = both(name)
    x, cond, t = family.latents(3), family.texts(3, 2, 4), torch.tensor([1.0, 0.8, 0.5])
    diagonal, half, zero = (net(x, t, r, cond) for r in (t, t / 2, 0 * t))
    for one, other in ((diagonal, half), (half, zero), (diagonal, zero)):
        assert (distance(one, other) > 1e-4).all()


@every
@torch.no_grad()
def test_the_fake_trajectory_has_its_own_velocity(name: str) -> None:
    family, _, net = both(name)
    x, cond, t = family.latents(3), family.texts(3, 2, 4), torch.tensor([1.0, 0.6, 0.1])
    assert (distance(net(x, t, t, cond), net(x, -t, -t, cond)) > 1e-4).all()
    zero = 0 * t
    assert torch.equal(net(x, zero, zero, cond), net(x, -zero, -zero, cond))


@every
@torch.no_grad()
def test_bfloat16_tells_times_apart_that_bfloat16_cannot(name: str) -> None:
    family, _, net = both(name)
    half, x, cond = copy.deepcopy(net).bfloat16(), family.latents(4), family.texts(3, 2, 4, 1)
    t = torch.tensor([0.999, 0.75, 0.502, -0.751])
    near = t + 1e-3
    assert torch.equal(t[1:2].bfloat16(), near[1:2].bfloat16())  # or this test says nothing
    here = half(x, t, t, cond)
    assert here.dtype == torch.float32
    assert (distance(here, half(x, near, near, cond)) > 0).all()
    r = t / 2
    assert (distance(half(x, t, r, cond), half(x, t, r + 1e-3, cond)) > 0).all()


@every
@torch.no_grad()
def test_bfloat16_stays_near_float32(name: str) -> None:
    family, _, net = both(name)
    x, cond, t = family.latents(4), family.texts(3, 2, 4, 1), torch.tensor([1.0, 0.7, 0.4, -0.2])
    exact = net(x, t, t / 2, cond)
    half = copy.deepcopy(net).bfloat16()(x, t, t / 2, cond)
    assert float((exact - half).square().mean().sqrt()) < 0.05 * float(exact.std())


@every
@pytest.mark.parametrize("kind", [TargetTime.shift, TargetTime.shift_all])
@torch.no_grad()
def test_a_shifted_network_sees_one_time_and_a_frozen_teacher_its_own(
    name: str, kind: TargetTime
) -> None:
    family, stock, _ = both(name)
    size = replace(family.small, target_time=kind)
    shifted = filled(size, size.stored_weights(family.folder))
    x, cond, t = family.latents(3), family.texts(3, 2, 4), torch.tensor([1.0, 0.6, 0.2])
    for r in (t, t / 2, 0 * t):
        assert torch.equal(shifted(x, t, r, cond), family.ask(stock, x, t - r / 2, cond))
    shifted.keep_own_clock()
    clock = t if kind is TargetTime.shift else t / 2
    assert torch.equal(shifted(x, t, t, cond), family.ask(stock, x, clock, cond))


# Texts


@every
@torch.no_grad()
def test_padding_and_company_do_not_change_a_sample(name: str) -> None:
    # In float64, where whatever the order of sums does is far smaller than what company could.
    family, _, single = both(name)
    net, lengths = copy.deepcopy(single).double(), (3, 1, 40, 2)
    x, cond = family.latents(4).double(), family.texts(*lengths)
    t, r = torch.tensor([1.0, 0.9, 0.4, -0.6]), torch.tensor([0.0, 0.9, 0.1, -0.6])
    together = net(x, t, r, cond)
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        tokens = cond.tokens[row, :length] if family.pads else cond.tokens[row]
        alone = net(x[row], t[row], r[row], replace(cond[row], tokens=tokens, mask=None))
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-8)
    if family.pads:
        longer = cond.padded(50)
        mask = longer.full_mask()
        garbage = replace(longer, tokens=torch.where(mask[..., None], longer.tokens, 50.0))
        torch.testing.assert_close(net(x, t, r, garbage), together, rtol=0, atol=1e-8)
    else:
        with pytest.raises(UserError, match="same number of tokens"):
            net(x, t, r, replace(cond, mask=cond.full_mask()))


@every
@torch.no_grad()
def test_text_matters_and_so_does_every_part_of_it(name: str) -> None:
    family, _, net = both(name)
    x, t, cond = family.latents(1), torch.tensor([0.7]), family.texts(4)
    here, other = net(x, t, t, cond), family.texts(4, seed=5)
    assert (distance(here, net(x, t, t, replace(cond, tokens=other.tokens))) > 1e-3).all()
    if family.pooled_width:
        assert (distance(here, net(x, t, t, replace(cond, pooled=other.pooled))) > 1e-3).all()
        with pytest.raises(UserError, match="pooled embedding"):
            net(x, t, t, replace(cond, pooled=None))


# Parameters


@every
def test_frozen_are_exactly_the_parameters_without_gradient(name: str) -> None:
    family = FAMILIES[name]
    net = filled(family.small, family.small.stored_weights(family.folder))
    frozen = {own for own, p in net.named_parameters() if not p.requires_grad}
    assert all(own.removesuffix(".bias").removesuffix(".weight").endswith(family.frozen or "?")
               for own in frozen)  # fmt: skip
    assert all(any(end in own for own in frozen) for end in family.frozen)
    t = torch.tensor([0.9, 0.5, -0.3])
    net(family.latents(3), t, t / 2, family.texts(3, 2, 4)).square().sum().backward()
    assert frozen == {own for own, p in net.named_parameters() if p.grad is None}


@every
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    family = FAMILIES[name]
    x, cond, t = family.latents(3), family.texts(3, 2, 4), torch.tensor([0.9, 0.5, -0.3])
    kept, anew, ran = family.net(), family.net(), list[object]()
    once = recompute_every(1, len(anew.blocks))

    def call(block: Any, *inputs: Any) -> object:
        ran.append(block)
        return once(block, *inputs)

    anew.recompute(call)
    for net in (kept, anew):
        net(x, t, t / 2, cond).square().sum().backward()
    assert ran == anew.blocks
    for (own, one), other in zip(kept.named_parameters(), anew.parameters(), strict=True):
        if one.grad is None or other.grad is None:
            assert one.grad is other.grad, own
        else:
            assert torch.equal(one.grad, other.grad), own


@every
def test_every_parameter_is_named_as_in_the_released_weights(name: str) -> None:
    family, stock, net = both(name)
    names = net.stored_names()
    assert len(set(names.values())) == len(names)
    second = {n for n in names.values() if n.startswith(f"{family.small.second.name}.")}
    assert second
    assert set(names.values()) - second == set(stock.state_dict())


@every
def test_released_sizes_build_on_meta_in_seconds(name: str) -> None:
    for released in FAMILIES[name].released:
        began = time.perf_counter()
        net = released.model.build()
        seconds = time.perf_counter() - began
        parameters = dict(net.named_parameters())
        assert {p.device.type for p in parameters.values()} == {"meta"}
        second = sum(p.numel() for own, p in parameters.items() if ".embed_r." in own)
        assert second == released.second
        assert sum(p.numel() for p in parameters.values()) == released.stock + second
        assert sum(p.numel() for p in net.blocks[0].parameters()) == released.block
        inside = {p for block in net.blocks for p in block.parameters()}
        assert sum(p.numel() for p in inside) > 0.85 * released.stock
        assert not [buffer for buffer, b in net.named_buffers() if b.is_meta]
        # FSDP2 cuts the first axis, and gathers it padded: a large tensor needs a long one.
        assert all(len(p) >= 1000 for p in parameters.values() if p.numel() > 1e6)
        assert seconds < 30


@every
def test_the_released_configuration_is_one_of_the_stock_class(name: str) -> None:
    """Else diffusers would ignore a key with a warning, or give it a default of its own."""
    family = FAMILIES[name]
    config = family.stock_model().config
    for key, value in family.small.stock_arguments().items():
        assert json.dumps(config[key]) == json.dumps(value), key
    assert family.small.stock_config()["_class_name"] == family.stock.__name__
    ends = {own for block in both(name)[2].blocks for own, _ in block.named_modules()}
    for target in family.small.lora_targets:
        assert any(own.endswith(target) for own in ends), target


# Weights


@every
@torch.no_grad()
def test_random_weights_start_as_a_network_that_says_zero_and_can_learn(name: str) -> None:
    family = FAMILIES[name]
    net = filled(family.small, family.small.random_weights(7))
    again = filled(family.small, family.small.random_weights(7))
    x, cond, t = family.latents(2), family.texts(3, 2), torch.tensor([1.0, 0.4])
    assert not net(x, t, t / 2, cond).any()
    for (own, one), other in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), own
        assert bool(one.isfinite().all()), own
    with torch.enable_grad():
        net(x, t, t / 2, cond).sub(x).square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@every
def test_what_is_stored_is_read_and_the_second_embedder_starts_as_the_paper_has_it(
    name: str,
) -> None:
    family, stock, _ = both(name)
    net = filled(family.small, family.small.stored_weights(family.folder, seed=3))
    theirs = stock.state_dict()
    second = family.small.second
    for own, parameter in net.named_parameters():
        stored = net.stored_name(own)
        if stored in theirs:
            assert torch.equal(parameter, theirs[stored].view_as(parameter)), own
            continue
        inner = stored.removeprefix(f"{second.name}.")
        if second.copied:
            assert torch.equal(parameter, theirs[f"{second.first}.{inner}"]), own
        elif own.endswith("bias"):
            assert not parameter.any()
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.2)


@every
@torch.no_grad()
def test_what_we_save_loads_in_the_stock_class_and_in_ours(name: str, tmp_path: Path) -> None:
    family, _, _ = both(name)
    net = family.net()
    tensors = {net.stored_name(own): p.detach() * 1.5 for own, p in net.named_parameters()}
    family.small.save(tmp_path, iter(tensors.items()))
    loaded = family.stock.from_pretrained(tmp_path / "transformer").eval()
    state = loaded.state_dict()
    second = {n for n in tensors if n.startswith(f"{family.small.second.name}.")}
    assert state.keys() == tensors.keys() - second
    assert all(torch.equal(state[n].view_as(tensors[n]), tensors[n]) for n in state)
    again = filled(family.small, family.small.stored_weights(tmp_path))
    x, cond, t = family.latents(2), family.texts(3, 2), torch.tensor([1.0, 0.4])
    assert torch.equal(again(x, t, t, cond), family.ask(loaded, x, t, cond))
    for own, parameter in again.named_parameters():
        assert torch.equal(parameter, tensors[again.stored_name(own)])


@every
@pytest.mark.parametrize("other", NAMES)
def test_weights_of_another_family_are_refused_by_both_names(name: str, other: str) -> None:
    ours, theirs = FAMILIES[name], FAMILIES[other]
    if name == other:
        return
    said = f"its _class_name is {theirs.stock.__name__}, the configuration's is "
    if ours.stock is theirs.stock:  # Qwen-Image and the newest that edits
        said = f"its zero_cond_t is {bool(theirs.references)}, the configuration's is "
    wanted = ours.references > 0 if ours.stock is theirs.stock else ours.stock.__name__
    with pytest.raises(UserError, match=f"{said}{wanted}"):
        ours.small.stored_weights(theirs.folder)


@every
def test_missing_and_unexpected_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = Path(shutil.copytree(family.folder, tmp_path / "copy"))
    tensors = load_file(folder / FILE)
    gone = max(tensors)
    save_file({n: t for n, t in tensors.items() if n != gone}, folder / FILE)
    with pytest.raises(UserError, match=f"has no tensor '{gone}'"):
        filled(family.small, family.small.stored_weights(folder))
    save_file(tensors | {"controlnet.weight": torch.ones(1)}, folder / FILE)
    with pytest.raises(UserError, match=r"1 tensors that the model has no place for: controlnet"):
        family.small.stored_weights(folder)


@every
def test_weights_of_another_size_are_refused_by_key(name: str) -> None:
    family = FAMILIES[name]
    small: Any = family.small
    deeper = replace(small, layers=small.layers + 1)
    with pytest.raises(UserError, match=rf"layers is {small.layers}, .* {small.layers + 1}"):
        deeper.stored_weights(family.folder)


# Data


@every
def test_data_that_does_not_fit_is_refused_with_both_numbers(name: str) -> None:
    family = FAMILIES[name]
    small, pooled = family.small, family.pooled_width
    fits: Any = {"pooled_width": pooled, "references": family.references}
    small.check((4, HEIGHT, WIDTH), 12, **fits)
    bad = [
        (((3, HEIGHT, WIDTH), 12), fits, "model.channels is 4, the data has 3"),
        (((4, HEIGHT, WIDTH), 13), fits, "model.text_width is 12, .* width 13"),
        (((4, HEIGHT, WIDTH), 12), fits | {"pooled_width": pooled + 1}, f"width {pooled + 1}"),
    ]
    other = 0 if family.references else 1
    said = f"{other} reference images a sample"
    bad.append((((4, HEIGHT, WIDTH), 12), fits | {"references": other}, said))
    if small.patch > 1:
        bad.append((((4, HEIGHT, 7), 12), fits, "4x7 do not divide by model.patch = 2"))
    if pooled:
        bad.append((((4, HEIGHT, WIDTH), 12), {}, f"pooled_width is {pooled}.* width 0"))
        bad.append((((4, 4, 14), 12), fits, "4x14 .* model.positions = 6 .* at most 12x12"))
    for data, extras, said in bad:
        with pytest.raises(UserError, match=said):
            small.check(*data, **extras)


@every
def test_a_size_that_cannot_be_built_is_refused_by_key(name: str) -> None:
    small: Any = FAMILIES[name].small
    for key in ("layers", "heads", "head_dim", "text_width", "channels", "patch"):
        with pytest.raises(ValueError, match=f"model.{key} must be at least 1, got 0"):
            replace(small, **{key: 0})


def test_sana_s_width_must_divide_by_its_heads() -> None:
    small: Any = FAMILIES["sana"].small
    with pytest.raises(ValueError, match=r"model.cross_heads = 3 must divide .* = 16"):
        replace(small, cross_heads=3)
    with pytest.raises(ValueError, match=r"model\.feed_forward must be positive"):
        replace(small, feed_forward=0.0)


def test_sd3_s_own_sizes_are_refused_by_key() -> None:
    small: Any = FAMILIES["sd3"].small
    for changes, said in {
        "dual": (4, "model.dual must be in 0..model.layers = 3: 4"),
        "positions": (0, "model.positions must be at least 1"),
        "head_dim": (7, "must divide by 4 .* got 14"),
    }.items():
        value, message = said
        with pytest.raises(ValueError, match=message):
            replace(small, **{changes: value})


def test_z_image_takes_no_image_beyond_its_positions() -> None:
    small = FAMILIES["z_image"].small
    small.check((4, 2, 1024), 12)
    with pytest.raises(UserError, match=r"2x1026 are larger .* at most 1024x1024"):
        small.check((4, 2, 1026), 12)


@torch.no_grad()
def test_random_sd3_weights_hold_the_stock_class_s_own_positions() -> None:
    family = FAMILIES["sd3"]
    net = filled(family.small, family.small.random_weights(0))
    (table,) = family.stock_model().pos_embed.pos_embed
    assert torch.equal(net.stock.pos_embed.pos_embed, table)
    for weights in (family.small.random_weights(0), family.small.stored_weights(family.folder)):
        rows = weights.read("pos_embed.pos_embed", table.shape, 5, 11)
        assert torch.equal(rows, table[5:11])


@torch.no_grad()
def test_z_image_reads_a_caption_without_its_padding_and_pads_it_its_own_way() -> None:
    family, _, net = both("z_image")
    x, t = family.latents(1), torch.tensor([0.6])
    short, padded = family.texts(3), Condition(tokens=family.texts(3).tokens).padded(9)
    assert padded.mask is not None
    assert torch.equal(net(x, t, t, padded), net(x, t, t, short))
    zeros_seen = replace(padded, mask=torch.ones_like(padded.mask))
    assert not torch.equal(net(x, t, t, zeros_seen), net(x, t, t, short))
