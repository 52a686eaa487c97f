"""Qwen-Image-Edit behind our convention: the stock network with reference images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from torch import Tensor

from tests.models.tools import SMALL, filled, latents, loose_second_embedder, stock_model, texts
from twinflow_train.batch import Condition
from twinflow_train.errors import UserError
from twinflow_train.models.qwen_image import QwenImageNet
from twinflow_train.models.qwen_image_edit import QwenImageEdit

SIZES: Any = {key: value for key, value in vars(SMALL).items() if key != "target_time"}
LATENT = (SMALL.channels, 4, 6)


def size(*, zero_cond_t: bool) -> QwenImageEdit:
    return QwenImageEdit(**SIZES, zero_cond_t=zero_cond_t)


def edited(cond: Condition, *shapes: tuple[int, int]) -> Condition:
    """Add reference latents of these heights and widths."""
    draws = torch.Generator().manual_seed(9)
    found = (torch.randn(len(cond), SMALL.channels, *shape, generator=draws) for shape in shapes)
    return replace(cond, references=tuple(found))


def ask_stock(model: QwenImageTransformer2DModel, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Call the stock class as its edit pipeline does."""
    pictures = (x, *cond.references)
    packed = [QwenImageEditPlusPipeline._pack_latents(p, *p.shape) for p in pictures]
    tokens = model(
        hidden_states=torch.cat(packed, dim=1),
        encoder_hidden_states=cond.tokens,
        encoder_hidden_states_mask=cond.mask,
        timestep=t,
        img_shapes=[[(1, p.shape[2] // 2, p.shape[3] // 2) for p in pictures]] * len(x),
        return_dict=False,
    )[0][:, : packed[0].shape[1]]
    height, width = (8 * side for side in x.shape[2:])
    out: Tensor = QwenImageEditPlusPipeline._unpack_latents(tokens, height, width, 8)[:, :, 0]
    return out


@pytest.fixture(scope="module", params=[False, True], ids=["2509", "2511"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QwenImageTransformer2DModel, QwenImageNet]:
    """The stock network, saved by its own class, and ours with its weights."""
    folder, own = tmp_path_factory.mktemp("stock"), size(zero_cond_t=request.param)
    stock = stock_model(zero_cond_t=request.param)
    stock.save_pretrained(folder)
    return stock, loose_second_embedder(filled(own.stored_weights(folder), own))


@pytest.mark.parametrize("shapes", [[(4, 6)], [(4, 6), (4, 6)], [(6, 4), (2, 8), (4, 6)]])
@torch.no_grad()
def test_at_r_equal_t_it_is_the_stock_network_bit_for_bit(
    both: tuple[QwenImageTransformer2DModel, QwenImageNet], shapes: list[tuple[int, int]]
) -> None:
    stock, net = both
    x, t = latents(3), torch.tensor([1.0, 0.123456789, 0.4])
    for cond in (texts(3, 3, 3), texts(3, 1, 5)):
        ours = edited(cond, *shapes)
        assert torch.equal(net(x, t, t, ours), ask_stock(stock, x, t, ours))


@torch.no_grad()
def test_each_reference_and_their_order_matter(
    both: tuple[QwenImageTransformer2DModel, QwenImageNet],
) -> None:
    _, net = both
    x, t, cond = latents(2), torch.tensor([0.9, 0.4]), edited(texts(3, 2), (4, 6), (4, 6))
    here = net(x, t, 0 * t, cond)
    first, second = cond.references
    for others in ((first,), (second, first), (first, 0 * second), (0 * first, second)):
        there = net(x, t, 0 * t, replace(cond, references=others))
        assert ((here - there).abs().flatten(1).max(1).values > 1e-3).all()


@torch.no_grad()
def test_a_row_has_its_own_references(
    both: tuple[QwenImageTransformer2DModel, QwenImageNet],
) -> None:
    _, net = both
    x, t, cond = latents(3), torch.tensor([0.9, 0.4, -0.7]), edited(texts(3, 2, 4), (4, 6))
    together = net(x, t, t / 2, cond)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = net(x[rows], t[rows], t[rows] / 2, cond[rows])
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_the_newer_release_modulates_references_as_clean() -> None:
    x, cond = latents(1), edited(texts(3), (4, 6))
    t = torch.tensor([0.8])
    nets = [
        filled(size(zero_cond_t=z).random_weights(0), size(zero_cond_t=z)) for z in (False, True)
    ]
    with torch.no_grad():
        for net in nets:
            for name, parameter in net.named_parameters():
                if "_mod." in name or "out." in name:  # zero at the start
                    draws = torch.Generator().manual_seed(len(name))
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    older, newer = nets
    assert float((older(x, t, t, cond) - newer(x, t, t, cond)).abs().max()) > 1e-3
    torch.testing.assert_close(older(x, 0 * t, 0 * t, cond), newer(x, 0 * t, 0 * t, cond))


def test_every_parameter_learns_from_edits(
    both: tuple[QwenImageTransformer2DModel, QwenImageNet],
) -> None:
    _, net = both
    t = torch.tensor([0.9, 0.5])
    net(latents(2), t, t / 2, edited(texts(3, 2), (4, 6))).square().sum().backward()
    got = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert got == {name for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()


def test_data_without_references_is_refused() -> None:
    model = size(zero_cond_t=True)
    for references in (1, 2, 5):
        model.check(LATENT, SMALL.text_width, references=references)
    with pytest.raises(UserError, match=r"0 reference images a sample, .* wants 1 or more"):
        model.check(LATENT, SMALL.text_width)
    with pytest.raises(UserError, match=r"pooled embeddings of width 7"):
        model.check(LATENT, SMALL.text_width, references=1, pooled_width=7)
    with pytest.raises(UserError, match=r"2 reference images a sample, .* takes none"):
        SMALL.check(LATENT, SMALL.text_width, references=2)


@pytest.mark.parametrize("older", [False, True])
def test_another_release_is_refused_also_where_its_config_is_older(
    tmp_path: Path, older: bool
) -> None:
    stock_model().save_pretrained(tmp_path)
    if older:
        path = tmp_path / "config.json"
        said = json.loads(path.read_text())
        for key in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            del said[key]
        path.write_text(json.dumps(said))
    size(zero_cond_t=False).stored_weights(tmp_path)
    with pytest.raises(UserError, match=r"its zero_cond_t is False, the configuration's is True"):
        size(zero_cond_t=True).stored_weights(tmp_path)
