"""Memory: what is reckoned is what a real engine's allocator hands out."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers import spawn
from twinflow_train.batch import Batch, Condition
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Precision
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW, AdamW8bit
from twinflow_train.engines.single import Single
from twinflow_train.models.adapter import NoAdapter
from twinflow_train.models.lora import LoRA
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.sana import Sana
from twinflow_train.objectives.presets import flow_matching
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner.gpus import GPUS
from twinflow_train.planner.memory import Job, latent_side, memory
from twinflow_train.planner.plan import (
    CONTEXT,
    ONE_GPU,
    alternatives,
    needed,
    plan,
    remedies,
    unfit,
)
from twinflow_train.planner.report import lines

STEPS = 1


def job(*, layers: int = 4, heads: int = 6, ranks: int = 1, **changes: Any) -> Job:
    """Give a job of a network in which state, blocks and activations all matter."""
    usual: dict[str, Any] = {
        "model": QwenImage(
            layers=layers, heads=heads, head_dim=32, text_width=64, channels=4, rope=[16, 8, 8]
        ),
        "adapter": NoAdapter(),
        "objective": TwinFlow(),
        "engine": FSDP2(precision=Precision.bf16),
        "optim": AdamW(),
        "average": Averages(),
        "batch": 8,
        "micro_batch": 4,
        "seed": 0,
        "latent": (32, 32),
        "text": 32,
        "gloo": True,
    }
    return Job(**(usual | changes), ranks=ranks)


def measured(world: World, wanted: Job) -> int:
    """Take steps on the real engine; return the most bytes that the allocator had handed out."""
    deal = replace(wanted, ranks=world.size).deal
    cond = Condition(tokens=torch.zeros(wanted.micro_batch, wanted.text, wanted.model.text_width))
    latent = (wanted.model.channels, *wanted.latent)
    data = torch.zeros(wanted.micro_batch, *latent)
    batch = Batch(data=data, cond=cond, null=cond[:1], keys=("",) * wanted.micro_batch)
    draws = [
        wanted.objective.draw(deal, micro, seed=0, step=0, latent=latent)
        for micro in range(deal.micro_steps)
    ]
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine = wanted.engine.shard(
            wanted.model,
            wanted.adapter.weights(wanted.model.random_weights(0), seed=0),
            adapter=wanted.adapter,
            optim=wanted.optim,
            decay=wanted.objective.teacher_decay,
            average=wanted.average,
            world=world,
        )
        for _ in range(STEPS):
            engine.begin(1e-4)
            for micro, drawn in enumerate(draws):
                loss = wanted.objective.loss(engine.student, engine.teacher, batch, drawn).total
                engine.backward(loss, last=micro == len(draws) - 1)
                del loss
            engine.step(1e-4)
    found = seen.profiler
    assert found is not None
    assert found.kineto_results is not None
    live = most = 0
    for _, change in sorted(changes(found.kineto_results.experimental_event_tree())):
        live += change
        most = max(most, live)
    return most


def changes(tree: Sequence[Any]) -> list[tuple[int, int]]:
    """Give when memory was taken and given back (ns, bytes).

    What gloo's own threads give back no profile of torch sees. They are done when the call that
    waits for them returns: there the copy ends that a collective made and no one was seen to free.
    """
    found: list[tuple[int, int, int, int]] = []  # when, where, bytes, when gloo is done with it
    todo: list[tuple[Any, list[Any]]] = [(event, []) for event in tree]
    while todo:
        event, above = todo.pop()
        todo += [(child, [*above, event]) for child in event.children]
        if "Allocation" not in str(event.tag):
            continue
        names = [one.name.startswith("c10d::") for one in above]
        caller = above[max(0, names.index(True) - 1)] if any(names) else None
        ends = 0 if caller is None else caller.end_time_ns
        fields = event.extra_fields
        found.append((event.start_time_ns, fields.ptr, fields.alloc_size, ends))
    alive: dict[int, tuple[int, int]] = {}
    unseen: list[tuple[int, int]] = []
    for _, where, size, ends in sorted(found):
        if where in alive and (size < 0 or alive[where][1]):
            before = alive.pop(where)
            unseen += [(before[1], -before[0])] if size > 0 else []
        if size > 0:
            alive[where] = size, ends
    unseen += [(ends, -size) for size, ends in alive.values() if ends]
    return [(when, size) for when, _, size, _ in found] + unseen


OWN_TEACHER = TwinFlow(teacher_decay=0.0)
BOTH = {
    "activations": job(layers=2, ranks=2),
    "state": job(layers=6, latent=(16, 16), ranks=2),
}
ALONE = {
    "single": job(
        engine=Single(), optim=AdamW8bit(), objective=OWN_TEACHER, micro_batch=4, batch=4
    ),
    "kept": job(engine=FSDP2(recompute=0), micro_batch=2, batch=4),
    "recomputed": job(micro_batch=4, batch=4),
    "teacher gathered": job(engine=FSDP2(keep_teacher=True), micro_batch=4, batch=4),
    "lora": job(adapter=LoRA(rank=8, alpha=8), micro_batch=4, batch=4),
}


WITH_GRADIENT = job(
    engine=FSDP2(precision=Precision.fp32),
    objective=replace(flow_matching(), teacher_decay=0.0),
    micro_batch=1,
    batch=1,
)
FREED = replace(WITH_GRADIENT, engine=Single(precision=Precision.fp32))


def several(world: World, jobs: dict[str, Job]) -> dict[str, int]:
    return {name: measured(world, one) for name, one in jobs.items()}


@cache
def alone() -> dict[str, int]:
    extra = {"with the gradient": WITH_GRADIENT, "freed by block": FREED}
    (found,) = spawn(several, 1, ALONE | extra, timeout_seconds=300)
    return dict(found)


def test_one_rank_takes_what_is_reckoned() -> None:
    ratios = {name: memory(one).peak / alone()[name] for name, one in ALONE.items()}
    assert all(abs(ratio - 1) < 0.1 for ratio in ratios.values()), ratios


def test_each_of_two_ranks_takes_what_is_reckoned() -> None:
    for found in spawn(several, 2, BOTH, timeout_seconds=300):
        ratios = {name: memory(one).peak / found[name] for name, one in BOTH.items()}
        assert all(abs(ratio - 1) < 0.05 for ratio in ratios.values()), ratios


def test_updating_in_the_backward_pass_saves_nearly_the_whole_gradient() -> None:
    gradient = 4 * sum(p.numel() for p in FREED.model.build().parameters() if p.requires_grad)
    ordinary, ours = alone()["with the gradient"], alone()["freed by block"]
    assert ordinary - ours > 0.9 * gradient
    # Both hold weights and moments; the one holds no more of the gradient than of a block.
    state = memory(FREED).held
    assert state == memory(WITH_GRADIENT).held
    assert ordinary - state > gradient
    assert ours - state < 0.9 * gradient


def test_what_does_not_fit_is_refused_with_changes_that_do() -> None:
    small = job(layers=1, objective=flow_matching(), micro_batch=1, gloo=False)
    whole = memory(small)
    assert sum(whole.items().values()) == pytest.approx(whole.peak)
    assert unfit(small, CONTEXT + whole.peak) == ""
    reason = unfit(small, CONTEXT + 0.8 * whole.peak)
    assert "this would fit: " in reason
    assert "engine.offload=true" in reason
    assert "no setting makes it fit" in unfit(small, CONTEXT / 2)


def test_more_ranks_hold_less_and_a_plan_says_so() -> None:
    small = job(layers=1, micro_batch=1, gloo=False)
    one, eight = (memory(replace(small, ranks=ranks)) for ranks in (1, 8))
    assert eight.held == pytest.approx(one.held / 8, rel=0.02)
    # Float32: each weight and its average, and two moments of those that are trained.
    numbers = [(p.numel(), p.requires_grad) for p in small.model.build().parameters()]
    assert one.held == sum(8 * n + 8 * n * trained for n, trained in numbers)
    found = plan(replace(small, ranks=8), GPUS["h100_80gb"], per_node=8)
    assert found.fits
    assert any("fits" in line for line in lines(found, steps=9, price_per_hour=2.0, remedies=[]))
    assert found.seconds[0] < found.seconds[1]
    assert 0 < found.use[0] < found.use[1] <= 0.45


@pytest.mark.parametrize(("model", "pixels", "side"), [(QwenImage(), 512, 64), (Sana(), 1024, 32)])
def test_latents_have_their_familys_size(model: Any, pixels: int, side: int) -> None:
    assert latent_side(model, pixels) == side


def test_on_one_gpu_updating_in_the_backward_pass_is_a_way_out() -> None:
    ((words, changed),) = alternatives(WITH_GRADIENT)
    assert words == ONE_GPU
    assert memory(changed).peak < memory(FREED).peak
    assert [*alternatives(replace(WITH_GRADIENT, batch=2, ranks=2))] == []


def test_with_it_a_smaller_batch_is() -> None:
    whole = job(layers=1, engine=Single(), optim=AdamW8bit(), objective=OWN_TEACHER, micro_batch=8)
    half = replace(whole, batch=4, micro_batch=4)
    between = (needed(memory(whole)) + needed(memory(half))) / 2
    assert remedies(whole, between) == ["batch=4 micro_batch=4"]
    # With fewer than four samples a role would have none.
    assert [*alternatives(half)] == []
