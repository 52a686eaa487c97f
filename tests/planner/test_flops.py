"""Operations: torch's own counter, and the published arithmetic of the 20B network, agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.families import FAMILIES
from twinflow_train.batch import Batch, Condition
from twinflow_train.deal import Deal
from twinflow_train.draws import Draws
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.lora import LoRA
from twinflow_train.models.openuni import OpenUni
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.objectives.presets import flow_matching
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner import rows_by_pass
from twinflow_train.planner.flops import Work, inputs, work
from twinflow_train.planner.speed import Meter

SMALL = {name: family.small for name, family in FAMILIES.items()} | {
    "openuni": OpenUni(
        layers=2, heads=4, head_dim=4, cross_heads=2, text_width=12, caption_width=10, channels=4,
        connector_layers=2, connector_heads=2, connector_hidden=16,
    )
}  # fmt: skip
ROWS = 2


def lengths(name: str) -> tuple[tuple[int, int], int]:
    """Give image tokens by side, and text tokens; Z-Image pads both to multiples of 32."""
    return ((8, 8), 96) if name == "z_image" else ((4, 6), 10)


def real(net: VelocityNet) -> VelocityNet:
    """Give a network on meta numbers."""
    net = net.to_empty(device="cpu")
    net.rebuild_constants()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.01)
    return net


def asked(
    model: Model, side: tuple[int, int], text: int
) -> tuple[Tensor, Tensor, Tensor, Condition]:
    x, t, r, cond = inputs(model, ROWS, tuple(n * model.patch for n in side), text)
    pooled = None if cond.pooled is None else torch.zeros(cond.pooled.shape)
    cond = replace(cond, tokens=torch.zeros(cond.tokens.shape), pooled=pooled)
    return torch.zeros(x.shape), torch.ones(len(t)), torch.zeros(len(r)), cond


def convolved(net: nn.Module, positions: int) -> int:
    """Count what gradients of convolutions take: torch's counter is wrong where they have groups.

    The first has no gradient of its input, which is the latents.
    """
    found = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    wanted = [weight.requires_grad + (i > 0) for i, weight in enumerate(found)]
    return sum(2 * w.numel() * n for w, n in zip(found, wanted, strict=True)) * positions


def counted(net: VelocityNet, model: Model, side: tuple[int, int], text: int) -> tuple[int, int]:
    """Count one row forwards and backwards by torch's counter, of attention as written out."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = net(*asked(model, side, text))
        with FlopCounterMode(display=False) as backward:
            out.square().sum().backward()
    products = {str(op): n for op, n in backward.get_flop_counts()["Global"].items()}
    products["aten.convolution_backward"] = ROWS * convolved(net, side[0] * side[1])
    return forward.get_total_flops() // ROWS, sum(products.values()) // ROWS


@pytest.mark.parametrize("name", SMALL)
def test_torchs_counter_agrees_for_every_family(name: str) -> None:
    model, (side, text) = SMALL[name], lengths(name)
    found = work(model, model.build())
    image = side[0] * side[1]
    forward, backward = counted(real(model.build()), model, side, text)
    assert found.passed(image, text) == forward
    assert found.learned(image, text) - found.passed(image, text) == backward


@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_torchs_counter_agrees_for_lora(name: str) -> None:
    model, (side, text) = SMALL[name], lengths(name)
    (one,) = LoRA(rank=3, alpha=3).assemble(model, [])
    found = work(model, one.net)
    image = side[0] * side[1]
    (other,) = LoRA(rank=3, alpha=3).assemble(model, [])
    forward, backward = counted(real(other.net), model, side, text)
    whole = work(model, model.build())
    ours = found.learned(image, text) - found.passed(image, text)
    assert (found.passed(image, text), ours) == (forward, backward)
    assert ours < whole.learned(image, text) - whole.passed(image, text)


@pytest.mark.parametrize("every", [1, 2])
def test_torchs_counter_agrees_on_what_is_computed_again(every: int) -> None:
    small, (side, text) = SMALL["qwen_image"], lengths("qwen_image")
    assert isinstance(small, QwenImage)
    model = replace(small, layers=3)
    found = work(model, model.build())
    _, without = counted(real(model.build()), model, side, text)
    other = real(model.build())
    other.recompute(recompute_every(every, 3))
    _, backward = counted(other, model, side, text)
    again = found.recomputed(side[0] * side[1], text, every=every)
    assert backward - without <= again  # torch stops once nothing more is wanted
    assert backward - without == pytest.approx(again, rel=0.25)
    assert found.recomputed(24, 10, every=0) == 0


@pytest.fixture(scope="module")
def some_layers() -> dict[int, Work]:
    """Count the released network with 2 and 3 of its 60 blocks, which are alike."""
    short = {layers: QwenImage(layers=layers) for layers in (2, 3)}
    return {layers: work(model, model.build()) for layers, model in short.items()}


@pytest.mark.parametrize(("pixels", "tera"), [(512, 55.8), (1024, 219), (1328, 404)])
def test_the_released_network_costs_what_is_known(
    some_layers: dict[int, Work], pixels: int, tera: float
) -> None:
    image = (pixels // 16) ** 2

    def whole(few: float, more: float) -> float:
        return few + 58 * (more - few)

    learned = [one.learned(image, 256) for one in some_layers.values()]
    assert whole(*learned) == pytest.approx(tera * 1e12, rel=2e-3)
    few, more = (one.by_stream(image, 256, gradient=True) for one in some_layers.values())
    parts = {name: whole(few[name], more[name]) for name in few}
    # 6.8B parameters a stream, and as many that see each sample once.
    assert parts["image"] == pytest.approx(6 * 6.8e9 * image, rel=3e-3)
    assert parts["text"] == pytest.approx(6 * 6.8e9 * 256, rel=1e-2)
    assert parts["sample"] == pytest.approx(6 * 6.8e9, rel=1e-2)
    assert parts["attention"] == pytest.approx(12 * 60 * 3072 * (image + 256) ** 2)


def meter(found: Work, objective: TwinFlow, *, flops: float | None = 1e9, ranks: int = 1) -> Meter:
    return Meter(work=found, order=objective.order, patch=2, recompute=1, flops=flops, ranks=ranks)


def step(objective: TwinFlow, texts: list[int]) -> tuple[list[Batch], list[Draws], Deal]:
    """Give a step of micro-batches of two rows, with texts of these lengths and a null of 3."""
    deal = Deal(batch=len(texts), micro_batch=2, ranks=1, rank=0)
    batches: list[Batch] = []
    draws: list[Draws] = []
    for micro, rows in enumerate(deal.rows()):
        cond = Condition.pad([torch.zeros(texts[i], 12) for i in rows])
        null = Condition(tokens=torch.zeros(1, 3, 12))
        data = torch.zeros(len(rows), 4, 8, 12)
        batches.append(Batch(data=data, cond=cond, null=null, keys=("",) * len(rows)))
        draws.append(objective.draw(deal, micro, seed=0, step=0, latent=data.shape[1:]))
    return batches, draws, deal


def test_the_meter_counts_each_pass_once() -> None:
    found, objective = work(SMALL["qwen_image"], SMALL["qwen_image"].build()), TwinFlow()
    batches, draws, deal = step(objective, [3] * 8)
    values = meter(found, objective).speed(batches, draws, 2.0)
    parts = found.step(rows_by_pass(objective, deal, seed=0), 24, 3)
    assert set(parts) == {"student", "generate", "guide", "recurse", "rectify"}
    assert all(value > 0 for value in parts.values())
    total = sum(parts.values())
    assert values["speed/mfu"] == pytest.approx(total / 2 / 1e9)
    again = 8 * found.recomputed(24, 3, every=1)
    assert values["speed/hfu"] == pytest.approx((total + again) / 2 / 1e9)
    assert values["speed/tflops"] == pytest.approx(total / 2 / 1e12)
    assert values["speed/samples"] == 4
    assert values["speed/tokens"] == 8 * (24 + 3) / 2


def test_padding_is_no_work_and_an_unknown_device_has_no_share() -> None:
    found, objective = work(SMALL["qwen_image"], SMALL["qwen_image"].build()), flow_matching()
    batches, draws, _ = step(objective, [2, 9])
    values = meter(found, objective, flops=None, ranks=4).speed(batches, draws, 1.0)
    ours = found.learned(24, 2) + found.learned(24, 9)
    assert values["speed/tflops"] == pytest.approx(ours / 1e12)
    assert values["speed/samples"] == 8
    assert {"speed/mfu", "speed/hfu"}.isdisjoint(values)
