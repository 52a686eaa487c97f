"""Our attention against the stock one, with padded texts and without."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from twinflow_train.models.attention import JointAttention, in_sequences, masked, rotate
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.rng import generator

HEADS, SIZE = 2, 8
IMAGE, TEXT = 6, 5
LENGTHS = torch.tensor([5, 1, 3])


def draw(*shape: int, name: str) -> Tensor:
    return torch.randn(shape, generator=generator("attention", name))


@pytest.fixture(scope="module")
def stock() -> QwenImageTransformer2DModel:
    size = QwenImage(layers=1, heads=HEADS, head_dim=SIZE, text_width=4, channels=1, rope=[2, 2, 4])
    net = QwenImageTransformer2DModel(**size.stock_arguments())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(draw(*parameter.shape, name=name) / 3)
    return net


@pytest.mark.parametrize("padded", [True, False])
def test_it_is_the_stock_attention(stock: QwenImageTransformer2DModel, padded: bool) -> None:
    attn: Any = stock.transformer_blocks[0].attn
    rope = stock.pos_embed([(1, 2, 3)] * 3, max_txt_seq_len=TEXT, device=torch.device("cpu"))
    mask = (torch.arange(TEXT) < LENGTHS[:, None]) if padded else None
    found = []
    for processor in (QwenDoubleStreamAttnProcessor2_0(), JointAttention()):
        attn.set_processor(processor)
        image = draw(3, IMAGE, HEADS * SIZE, name="image").requires_grad_()
        text = draw(3, TEXT, HEADS * SIZE, name="text").requires_grad_()
        outputs = attn(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            image_rotary_emb=rope,
        )
        sum(out.square().sum() for out in outputs).backward()
        found.append([*outputs, image.grad, text.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor, most: int, __: int
) -> Tensor:
    """Attend within each sequence of a packed row, as flash attention does on GPUs."""
    assert int(bounds[-1]) == len(q)
    assert int(bounds.diff().max()) <= most
    found = torch.empty_like(q)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if begin < end:
            a, b, c = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
            found[begin:end] = scaled_dot_product_attention(a, b, c)[0].transpose(0, 1)
    return found


def test_sequences_of_unequal_lengths_need_no_mask() -> None:
    shape = (3, IMAGE + TEXT, HEADS, SIZE)
    text_first = [draw(*shape, name=name) for name in "qkv"]
    mask = torch.arange(TEXT) < LENGTHS[:, None]
    wanted = masked(*text_first, mask=mask)
    image_first = [torch.cat([x[:, TEXT:], x[:, :TEXT]], dim=1) for x in text_first]
    found = in_sequences(*image_first, lengths=IMAGE + LENGTHS, attend=varlen)
    torch.testing.assert_close(found[:, :IMAGE], wanted[:, TEXT:])
    torch.testing.assert_close(found[:, IMAGE:][mask], wanted[:, :TEXT][mask])
    assert found.isfinite().all()


def test_compiled_it_rotates_in_real_numbers() -> None:
    x = draw(2, IMAGE, HEADS, SIZE, name="x")
    angles = draw(IMAGE, SIZE // 2, name="angles")
    at = torch.polar(torch.ones_like(angles), angles)
    plain = inspect.unwrap(rotate)  # without the tests' check of types
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, at), plain(x, at))


@pytest.mark.gpu
def test_on_a_gpu_sequences_give_what_the_mask_gives() -> None:
    shape = (3, 64 + 8, 4, 64)
    q, k, v = (draw(*shape, name=name).cuda().bfloat16().requires_grad_() for name in "qkv")
    lengths = torch.tensor([8, 1, 3], device="cuda")
    mask = torch.arange(8, device="cuda") < lengths[:, None]
    found = in_sequences(q, k, v, lengths=64 + lengths)[:, :64]
    swapped = (torch.cat([x[:, 64:], x[:, :64]], dim=1) for x in (q, k, v))
    wanted = masked(*swapped, mask=mask)[:, 8:]
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    ours, theirs = (torch.autograd.grad(x.float().square().sum(), q)[0] for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)
