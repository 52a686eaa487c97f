"""Qwen-Image behind our convention: the stock network, plus a second time."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from tests.models.tools import (
    HEIGHT,
    SMALL,
    WIDTH,
    filled,
    garbage_padding,
    latents,
    loose_second_embedder,
    save_stock,
    stock_model,
    texts,
)
from twinflow_train.batch import Condition
from twinflow_train.errors import UserError
from twinflow_train.flow.path import interpolate, jump
from twinflow_train.models.qwen_image import QwenImage, QwenImageNet, pack, unpack
from twinflow_train.models.two_times import TargetTime

EMBEDDER = 256 * 3072 + 3072 + 3072 * 3072 + 3072
"""Parameters of the released network's time embedder, whose copy is all that we add."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[QwenImageTransformer2DModel, Path]:
    folder = tmp_path_factory.mktemp("stock")
    return save_stock(folder), folder


@pytest.fixture(scope="module")
def net(stock: tuple[QwenImageTransformer2DModel, Path]) -> QwenImageNet:
    """Our network with the stock model's weights and a second embedder of its own."""
    return loose_second_embedder(filled(SMALL.stored_weights(stock[1])))


def ask_stock(model: QwenImageTransformer2DModel, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Call the stock class as its own pipeline does, with its own timestep argument."""
    rows, channels, height, width = x.shape
    dtype = model.img_in.weight.dtype
    tokens = model(
        hidden_states=QwenImagePipeline._pack_latents(x.to(dtype), rows, channels, height, width),
        encoder_hidden_states=cond.tokens.to(dtype),
        encoder_hidden_states_mask=cond.mask,
        timestep=t,
        img_shapes=[[(1, height // 2, width // 2)]] * rows,
        return_dict=False,
    )[0]
    out: Tensor = QwenImagePipeline._unpack_latents(tokens, height * 8, width * 8, 8)[:, :, 0]
    return out


@torch.no_grad()
def test_at_r_equal_t_it_is_the_stock_network_bit_for_bit(
    stock: tuple[QwenImageTransformer2DModel, Path], net: QwenImageNet
) -> None:
    x, t = latents(4), torch.tensor([1.0, 0.123456789, 0.5, 0.0])
    for cond in (texts(3, 3, 3, 3), texts(3, 1, 5, 2)):
        assert torch.equal(net(x, t, t, cond), ask_stock(stock[0], x, t, cond))


@torch.no_grad()
def test_the_second_time_matters_where_it_differs_from_the_first(net: QwenImageNet) -> None:
    x, cond = latents(3), texts(3, 2, 4)
    t = torch.tensor([1.0, 0.8, 0.5])
    diagonal, half, zero = (net(x, t, r, cond) for r in (t, t / 2, 0 * t))
    for one, other in ((diagonal, half), (half, zero), (diagonal, zero)):
        assert (_distance(one, other) > 1e-3).all()


@torch.no_grad()
def test_the_fake_trajectory_has_its_own_velocity(net: QwenImageNet) -> None:
    x, cond, t = latents(3), texts(3, 2, 4), torch.tensor([1.0, 0.6, 0.1])
    assert (_distance(net(x, t, t, cond), net(x, -t, -t, cond)) > 1e-3).all()


@torch.no_grad()
def test_bfloat16_tells_times_apart_that_bfloat16_cannot(
    stock: tuple[QwenImageTransformer2DModel, Path], net: QwenImageNet
) -> None:
    half, x, cond = copy.deepcopy(net).bfloat16(), latents(4), texts(3, 2, 4, 1)
    t = torch.tensor([0.999, 0.75, 0.502, -0.751])
    near = t + 1e-3
    assert torch.equal(t[1:2].bfloat16(), near[1:2].bfloat16())  # or this test says nothing
    here = half(x, t, t, cond)
    assert here.dtype == torch.float32
    assert (_distance(here, half(x, near, near, cond)) > 0).all()
    r = t / 2
    assert (_distance(half(x, t, r, cond), half(x, t, r + 1e-3, cond)) > 0).all()
    # The stock class loses them: what the six parts are for.
    coarse = stock_model().bfloat16()
    assert torch.equal(
        ask_stock(coarse, x, t, cond)[1], ask_stock(coarse, x, near.float(), cond)[1]
    )


@torch.no_grad()
def test_bfloat16_stays_near_float32(net: QwenImageNet) -> None:
    x, cond, t = latents(4), texts(3, 2, 4, 1), torch.tensor([1.0, 0.7, 0.4, -0.2])
    exact = net(x, t, t / 2, cond)
    half = copy.deepcopy(net).bfloat16()(x, t, t / 2, cond)
    assert float(_distance(exact, half).max()) < 0.05 * float(exact.std())


@torch.no_grad()
def test_euler_steps_are_those_of_the_stock_scheduler(
    stock: tuple[QwenImageTransformer2DModel, Path], net: QwenImageNet
) -> None:
    data, noise, cond = latents(2, 3), latents(2, 4), texts(3, 3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.2])
    theirs = scheduler.scale_noise(data, scheduler.timesteps[:1], noise)
    ours = interpolate(data, noise, torch.full((2,), 0.9))
    torch.testing.assert_close(ours, theirs)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = ask_stock(stock[0], theirs, (timestep / 1000).expand(2), cond)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        now, then = (torch.full((2,), float(t)) for t in (*[0.9, 0.6, 0.2, 0.0][i : i + 2],))
        ours = jump(ours, net(ours, now, now, cond), now, then)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (_distance(ours, noise) > 0.1).all()


@torch.no_grad()
def test_padding_and_company_do_not_change_a_sample(net: QwenImageNet) -> None:
    x, cond = latents(4), texts(3, 1, 5, 2)
    t, r = torch.tensor([1.0, 0.9, 0.4, -0.6]), torch.tensor([0.0, 0.9, 0.1, -0.6])
    together = net(x, t, r, cond)
    wider = net(x, t, r, garbage_padding(cond, 9))
    torch.testing.assert_close(wider, together, rtol=0, atol=1e-5)
    for i, length in enumerate((3, 1, 5, 2)):
        row = slice(i, i + 1)
        alone = net(x[row], t[row], r[row], Condition(tokens=cond.tokens[row, :length]))
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_text_and_order_of_text_matter(net: QwenImageNet) -> None:
    x, t, cond = latents(1), torch.tensor([0.7]), texts(4)
    flipped = Condition(tokens=cond.tokens.flip(1))
    assert (_distance(net(x, t, t, cond), net(x, t, t, flipped)) > 1e-4).all()
    assert (_distance(net(x, t, t, cond), net(x, t, t, texts(4, seed=5))) > 1e-3).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_pack_and_unpack_are_inverse(patch: int) -> None:
    x = latents(2)
    tokens = pack(x, patch)
    height, width = HEIGHT // patch, WIDTH // patch
    assert tokens.shape == (2, height * width, SMALL.channels * patch**2)
    assert torch.equal(unpack(tokens, patch, height, width), x)


def test_pack_and_unpack_are_the_stock_pipelines() -> None:
    x = latents(2)
    tokens = QwenImagePipeline._pack_latents(x, 2, SMALL.channels, HEIGHT, WIDTH)
    assert torch.equal(pack(x, 2), tokens)
    theirs = QwenImagePipeline._unpack_latents(tokens, HEIGHT * 8, WIDTH * 8, 8)[:, :, 0]
    assert torch.equal(unpack(tokens, 2, HEIGHT // 2, WIDTH // 2), theirs)


def test_frozen_are_exactly_the_parameters_without_gradient(
    stock: tuple[QwenImageTransformer2DModel, Path],
) -> None:
    net = filled(SMALL.stored_weights(stock[1]))
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for p in net.parameters())
    net.requires_grad_(True)
    t = torch.tensor([0.9, 0.5, -0.3])
    net(latents(3), t, t / 2, texts(3, 2, 4)).square().sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert frozen == without
    last = f"stock.transformer_blocks.{SMALL.layers - 1}."
    assert {name.removeprefix(last) for name in frozen} == {
        f"{module}.{kind}"
        for module in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        for kind in ("weight", "bias")
    }
    # The last block's text asks nothing that anybody hears: its queries get a zero gradient.
    dead = {
        name
        for name, p in net.named_parameters()
        if p.grad is not None and not bool(p.grad.abs().max() > 0)
    }
    assert dead == {f"{last}attn.{n}" for n in ("add_q_proj.weight", "add_q_proj.bias",
                                                "norm_added_q.weight")}  # fmt: skip


def test_every_parameter_is_named_as_in_the_released_weights(net: QwenImageNet) -> None:
    names = net.stored_names()
    assert len(set(names.values())) == len(names)
    stock_names = set(stock_model().state_dict())
    second = {name for name in names.values() if name.startswith("time_text_embed_2.")}
    assert set(names.values()) - second == stock_names
    assert {name.replace("_2.", ".", 1) for name in second} == {
        name for name in stock_names if name.startswith("time_text_embed.")
    }


def test_the_initial_network_says_zero_and_its_second_embedder_equals_its_first() -> None:
    net = filled(SMALL.random_weights(0))
    t = torch.tensor([0.9, 0.5])
    assert torch.count_nonzero(net(latents(2), t, t, texts(3, 2))) == 0
    embedder = net.stock.time_text_embed
    for first, second in zip(
        embedder.embed.parameters(), embedder.embed_r.parameters(), strict=True
    ):
        assert torch.equal(first, second)
    moved = [name for name, p in net.named_parameters() if p.ndim == 2 and bool(p.abs().max() > 0)]
    assert any("img_mlp" in name for name in moved)


def test_the_released_size_builds_on_meta_in_seconds() -> None:
    began = time.perf_counter()
    net = QwenImage().build()
    seconds = time.perf_counter() - began
    parameters = list(net.parameters())
    assert {p.device.type for p in parameters} == {"meta"}
    assert sum(p.numel() for p in parameters) == 20_430_401_088 + EMBEDDER
    assert len(net.blocks) == 60
    assert net.stock.pos_embed.pos_freqs.device.type == "cpu"
    assert seconds < 30  # 4 on an idle core


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"patch": -1}, "model.patch must be at least 1, got -1"),
        ({"rope": [4, 4]}, r"model.rope .* got \[4, 4\]"),
        ({"rope": [3, 3, 2]}, r"model.head_dim = 8, got \[3, 3, 2\]"),
        ({"rope": [4, 4, 4]}, r"model.head_dim = 8, got \[4, 4, 4\]"),
    ],
)
def test_a_size_that_cannot_be_built_is_refused_by_key(changes: dict[str, Any], named: str) -> None:
    sizes: dict[str, Any] = {"head_dim": 8, "rope": [4, 2, 2]} | changes
    with pytest.raises(ValueError, match=named):
        QwenImage(**sizes)


@pytest.mark.parametrize(
    ("latent", "width", "named"),
    [
        ((3, 4, 6), 12, "model.channels is 4, the data has 3"),
        ((4, 5, 6), 12, "5x6 do not divide by model.patch = 2"),
        ((4, 4, 7), 12, "4x7 do not divide by model.patch = 2"),
        ((4, 4, 6), 13, "model.text_width is 12, .* width 13"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_both_numbers(
    latent: tuple[int, int, int], width: int, named: str
) -> None:
    SMALL.check((4, 4, 6), 12)
    with pytest.raises(UserError, match=named):
        SMALL.check(latent, width)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest difference of each row."""
    return (one - other).abs().flatten(1).max(1).values


@pytest.mark.parametrize("kind", [TargetTime.shift, TargetTime.shift_all])
@torch.no_grad()
def test_a_shifted_network_sees_one_time_and_a_frozen_teacher_its_own(
    stock: tuple[QwenImageTransformer2DModel, Path], kind: TargetTime
) -> None:
    size = replace(SMALL, target_time=kind)
    shifted = filled(size.stored_weights(stock[1]), size)
    assert {shifted.stored_name(name) for name, _ in shifted.named_parameters()} == {
        name for name, _ in stock[0].named_parameters()
    }
    x, cond, t = latents(3), texts(3, 2, 4), torch.tensor([1.0, 0.6, 0.2])
    for r in (t, t / 2, 0 * t):
        assert torch.equal(shifted(x, t, r, cond), ask_stock(stock[0], x, t - r / 2, cond))
    shifted.keep_own_clock()
    clock = t if kind is TargetTime.shift else t / 2
    assert torch.equal(shifted(x, t, t, cond), ask_stock(stock[0], x, clock, cond))


@pytest.mark.parametrize("kind", TargetTime)
@torch.no_grad()
def test_before_training_the_base_is_the_stock_network(
    stock: tuple[QwenImageTransformer2DModel, Path], kind: TargetTime
) -> None:
    size = replace(SMALL, target_time=kind)
    base = size.pretrained(filled(size.stored_weights(stock[1]), size))
    x, cond, t = latents(3), texts(3, 2, 4), torch.tensor([1.0, 0.6, 0.2])
    assert torch.equal(base(x, t, t, cond), ask_stock(stock[0], x, t, cond))
