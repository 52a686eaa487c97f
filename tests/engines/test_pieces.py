"""AdamW in pieces: torch's with float32 moments, unbiased in bfloat16."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinflow_train.engines import pieces
from twinflow_train.engines.eightbit import packed, table, unpacked
from twinflow_train.engines.optim import AdamW, AdamW8bit, Optim
from twinflow_train.engines.pieces import Trained, advance, now_of, rule_of
from twinflow_train.engines.rounding import keys
from twinflow_train.rng import generator

CPU = torch.device("cpu")
USUAL: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}


def drawn(*shape: int, name: str) -> Tensor:
    return torch.randn(shape, generator=generator("pieces", name))


def trained(weights: Tensor, optim: Optim) -> Trained:
    return Trained(nn.Parameter(weights), "weights", optim)


def go(one: Trained, optim: Optim, gradients: list[Tensor], **changes: Any) -> None:
    """Update by one gradient after the other."""
    update, rate = changes.pop("update", advance), changes.pop("rate", optim.lr)
    rule = changes.pop("rule", rule_of(optim, CPU))
    for number, gradient in enumerate(gradients, start=1):
        count = torch.full((), number, device=one.parameter.device)
        now = now_of(optim, rate, count)._replace(**changes)
        one.step(gradient, update, now=now, rule=rule, key=keys(count, 1)[0])


def test_in_float32_it_is_torchs() -> None:
    weights, optim = drawn(40, 30, name="weights"), AdamW(**USUAL)
    gradients = [drawn(40, 30, name=f"gradient {n}") for n in range(20)]
    one, theirs = trained(weights.clone(), optim), nn.Parameter(weights.clone())
    plain = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    go(one, optim, gradients)
    for gradient in gradients:
        theirs.grad = gradient
        plain.step()
    assert (one.parameter - theirs).abs().max() < 1e-6
    for ours, kind in zip(one.moments, ("exp_avg", "exp_avg_sq"), strict=True):
        assert (ours[0].view(40, 30) - plain.state[theirs][kind]).abs().max() < 1e-6


@pytest.mark.parametrize("signed", [True, False])
def test_codes_name_the_nearest_level(signed: bool) -> None:
    among = table(CPU, signed=signed)
    assert among.levels.shape == (256,)
    assert bool((among.levels[1:] > among.levels[:-1]).all())
    values = drawn(64, 256, name="values") * 10.0 ** drawn(64, 1, name="sizes")
    values = values if signed else values.square()
    codes, scales = packed(values, among)
    assert torch.equal(scales, values.abs().amax(1))
    share = values / scales[:, None]
    nearest = (share[..., None] - among.levels).abs().amin(-1)
    chosen = (share - among.levels[codes.int()]).abs()
    assert (chosen - nearest).abs().max() < 1e-6
    assert (unpacked(codes, scales, among) - values).abs().max() < 0.05 * scales.max()


@pytest.mark.parametrize("optim", [AdamW(**USUAL), AdamW8bit(**USUAL)])
def test_pieces_are_the_whole(optim: Optim, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = drawn(64, 256, name="weights").to(torch.bfloat16)
    gradients = [drawn(64, 256, name=f"gradient {n}").to(torch.bfloat16) for n in range(3)]
    whole, cut = trained(weights.clone(), optim), trained(weights.clone(), optim)
    go(whole, optim, gradients)
    monkeypatch.setattr(pieces, "AT_ONCE", 5 * 256)
    go(cut, optim, gradients)
    assert same(whole, cut)
    assert not torch.equal(whole.parameter, weights)


def same(one: Trained, other: Trained) -> bool:
    def numbers(of: Trained) -> list[Tensor]:
        return [of.parameter, *of.moments[0], *of.moments[1]]

    return all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


@pytest.mark.parametrize("optim", [AdamW(**USUAL), AdamW8bit(**USUAL)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_is_not_fine_changes_nothing(optim: Optim, dtype: torch.dtype) -> None:
    weights = drawn(8, 256, name="weights").to(dtype)
    gradients = [drawn(8, 256, name="gradient").to(dtype)]
    one, other = trained(weights.clone(), optim), trained(weights.clone(), optim)
    go(one, optim, gradients)
    go(other, optim, gradients)
    spoiled = [torch.full_like(gradients[0], bad) for bad in (math.nan, math.inf)]
    go(one, optim, spoiled, fine=torch.tensor(False), share=torch.tensor(math.nan))
    assert same(one, other)


COPIES, STEPS, SIGMAS = 2048, 12, 5


@pytest.mark.parametrize("optim", [AdamW(**USUAL), AdamW8bit(**USUAL)])
def test_weights_in_bfloat16_are_those_of_float32_on_average(optim: Optim) -> None:
    """Each of 256 weights has 2048 copies, which draw by themselves; their mean is the master."""
    weights = drawn(1, 256, name="weights").to(torch.bfloat16)
    gradients = [drawn(1, 256, name=f"gradient {n}") for n in range(STEPS)]
    master = trained(weights.float(), optim)
    ours = trained(weights.expand(COPIES, -1).clone(), optim)
    go(master, optim, gradients)
    go(ours, optim, [gradient.expand(COPIES, -1) for gradient in gradients])
    copies, whole = ours.parameter.detach().double(), master.parameter.detach().double()
    off, spread = copies.mean(0) - whole[0], copies.std(0)
    assert float(spread.min()) > 0
    sigmas = off / (spread / math.sqrt(COPIES))
    assert sigmas.abs().max() < SIGMAS
    # And the squares are as chance would have them: no bias hides below the tolerance.
    assert float(sigmas.square().mean()) == pytest.approx(1, abs=SIGMAS * math.sqrt(2 / 256))


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """At 1, neighbours are 1/128 above and 1/256 below; 100 steps of 1e-5 come to 1e-3."""
    optim, ones = AdamW(lr=1e-5, betas=[0.9, 0.9], clip=0.0), torch.ones(1 << 16)
    one = trained(ones.to(torch.bfloat16), optim)
    go(one, optim, [ones] * 100)
    moved = 1 - one.parameter.detach().double()
    deviation = math.sqrt(1e-3 * 2**-8 / (1 << 16))
    assert float(moved.mean()) == pytest.approx(1e-3, abs=SIGMAS * deviation)
    # Rounded to the nearest, not one of them would have moved.
    assert torch.equal((ones - 1e-5).to(torch.bfloat16).float(), ones)


@pytest.mark.parametrize("optim", [AdamW(**USUAL), AdamW8bit(**USUAL)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_traced_whole_and_once_for_all_lengths(optim: Optim, dtype: torch.dtype) -> None:
    """What GPUs compile has no break, and gives the same numbers."""
    traces: list[object] = []

    def backend(graph: Any, _: object) -> Any:
        traces.append(graph)
        return graph.forward

    fused = torch.compile(advance, backend=backend, fullgraph=True)
    for rows in (24, 40, 56):
        weights = drawn(rows, 256, name="weights").to(dtype)
        gradients = [drawn(rows, 256, name=f"gradient {n}").to(dtype) for n in range(2)]
        one, other = trained(weights.clone(), optim), trained(weights.clone(), optim)
        go(one, optim, gradients)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "AT_ONCE", 16 * 256)
            go(other, optim, gradients, update=fused)
        assert same(one, other)
    assert len(traces) <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("optim", [AdamW(**USUAL), AdamW8bit(**USUAL)])
def test_a_gpus_kernel_gives_the_same_numbers_and_waits_for_nothing(optim: Optim) -> None:
    gpu, rule = torch.device("cuda"), rule_of(optim, torch.device("cuda"))
    fused = torch.compile(advance)
    weights = drawn(512, 256, name="weights").to(torch.bfloat16)
    gradients = [drawn(512, 256, name=f"gradient {n}").to(torch.bfloat16) for n in range(4)]
    there = [gradient.to(gpu) for gradient in gradients]
    go(trained(weights.to(gpu), optim), optim, there, rule=rule, update=fused)  # compiles
    one, other = trained(weights.clone(), optim), trained(weights.to(gpu), optim)
    go(one, optim, gradients)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        go(other, optim, there, rule=rule, update=fused)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours, theirs = one.parameter.detach().float(), other.parameter.detach().cpu().float()
    # The last digit of float32 may differ, and now and then it decides which way one is rounded.
    assert float((ours != theirs).float().mean()) < 1e-3
    assert (ours - theirs).abs().max() <= 2**-5
