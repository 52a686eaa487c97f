"""LoRA under both engines: one network that is several, against several networks in one process.

The plain process has a network of its own for the student and for each that follows it, with
adapters written out in a hook. It knows of no views and no shards.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twinflow_train.engines.zero3 as engine_module
from tests.engines.test_zero3 import checkpoints, zero3
from tests.engines.tools import (
    BATCH,
    LATENT,
    OPTIM,
    SEED,
    SIZE,
    STEPS,
    Outcome,
    State,
    Trial,
    apart,
    batch_of,
    fingerprint,
    fsdp2,
    objective,
    run,
    weights,
    whole,
)
from tests.helpers import spawn
from twinflow_train.batch import Velocity
from twinflow_train.checkpoint import Progress
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine, Precision, Sharded
from twinflow_train.models.adapter import BASE, Adapter, NoAdapter
from twinflow_train.models.base import VelocityNet
from twinflow_train.models.lora import LoRA
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.objectives import presets
from twinflow_train.objectives.twinflow import TwinFlow

LORA = LoRA(rank=3, alpha=6.0)
TEACHERS: dict[str, TwinFlow] = {
    "average": objective(),
    "self": objective(teacher_decay=0.0),
    "frozen": presets.twinflow_lora_order1(),
}
NEAR = {"loss": 1e-6, "norm": 3e-6, "model": 1e-6, "average": 1e-6}
"""Losses and norms relative, weights absolute: float32 sums in another order."""

ROUNDED = {"loss": 0.01, "norm": 0.1, "model": 4 * OPTIM.lr, "average": 4 * OPTIM.lr}
"""How far a run in bfloat16 may be from float32, measured alike."""

LAYOUTS: dict[int, dict[str, Engine]] = {
    1: {"fsdp2": fsdp2(recompute=1)},
    2: {"fsdp2": fsdp2(), "zero3": zero3(recompute=1)},
}
SAVED, LAST = 1, 3
MIDDLE = QwenImage(layers=6, heads=4, head_dim=32, text_width=96, channels=4, rope=[8, 12, 12])


def trial(engine: Engine, teacher: str = "average", **settings: Any) -> Trial:
    usual = {"adapter": LORA, "average": Averages(slow=0.9), "objective": TEACHERS[teacher]}
    return Trial.of(4, engine=engine, **(usual | settings))


@dataclass(kw_only=True)
class Life:
    """A run to its end: losses and norms by step; whole weights, on rank 0; a hash of all state."""

    losses: list[float]
    norms: list[float]
    end: dict[str, State]
    fingerprint: str

    def outcome(self) -> Outcome:
        return Outcome(losses=self.losses, norms=self.norms, **self.end)


@dataclass(kw_only=True)
class Found:
    """What one rank of one number of processes found out, by engine."""

    lives: dict[str, Life] = field(default_factory=dict)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    halves: dict[str, Outcome] = field(default_factory=dict)
    held: dict[str, dict[str, int]] = field(default_factory=dict)


# The same without an engine


def plain_network(adapted: bool) -> VelocityNet:
    """Build the base, frozen, and with adapters in hooks if there shall be any."""
    values = LORA.weights(weights(), seed=0)
    net = SIZE.build().to_empty(device="cpu")
    alive = {name for name, p in SIZE.build().named_parameters() if p.requires_grad}
    for own, p in net.named_parameters():
        name = net.stored_name(own)
        p.data.copy_(values.read(name, p.shape, 0, len(p)))
        p.requires_grad_(adapted and name.startswith("time_text_embed_2."))
    if adapted:
        for own, module in net.named_modules():
            if own.endswith(QwenImage.lora_targets) and f"{own}.weight" in alive:
                assert isinstance(module, nn.Linear)
                name = net.stored_name(own)
                down, up = (3, module.in_features), (module.out_features, 3)
                for side, shape in (("lora_A", down), ("lora_B", up)):
                    value = values.read(f"{name}.{side}.weight", torch.Size(shape), 0, shape[0])
                    module.register_parameter(side, nn.Parameter(value))
                module.register_forward_hook(add)
    return net


def add(layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """W x + alpha / rank B A x."""
    return out + 2.0 * (inputs[0] @ layer.lora_A.T @ layer.lora_B.T)


def added(net: VelocityNet) -> dict[str, nn.Parameter]:
    """Give what is trained of a plain network, by its name in weight files."""
    return {
        f"{net.stored_name(own)}{'.weight' if own.endswith(('lora_A', 'lora_B')) else ''}": p
        for own, p in net.named_parameters()
        if p.requires_grad
    }


@cache
def plain(teacher: str) -> Outcome:
    """Take the steps in one process, with a network each, and textbook updates."""
    aim, student = TEACHERS[teacher], plain_network(adapted=True)
    average, slow = copy.deepcopy(student), copy.deepcopy(student)
    asked = {"average": average, "self": student, "frozen": plain_network(adapted=False)}[teacher]
    ours = added(student)
    optimizer = torch.optim.AdamW(
        ours.values(), betas=(0.9, 0.99), eps=OPTIM.eps, weight_decay=0.01, foreach=False
    )
    deal = Deal(batch=BATCH, micro_batch=BATCH, ranks=1, rank=0)
    losses, norms, decays = [], [], [0.0, 0.0]
    for step in range(LAST):
        draws = aim.draw(deal, 0, seed=SEED, step=step, latent=LATENT)
        loss = aim.loss(student, asked, batch_of(range(BATCH), step), draws).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = OPTIM.rate(step, STEPS)
        norms.append(float(nn.utils.clip_grad_norm_(ours.values(), OPTIM.clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
        decays = [d + (1 - d) * (goal - d) / 2 for d, goal in zip(decays, (0.99, 0.9), strict=True)]
        for net, decay in zip((average, slow), decays, strict=True):
            with torch.no_grad():
                for a, p in zip(added(net).values(), ours.values(), strict=True):
                    a.copy_(decay * a + (1 - decay) * p)
    end = {name: p.detach().clone() for name, p in ours.items()}
    return Outcome(
        losses=losses,
        norms=norms,
        model=end,
        average={name: p.detach() for name, p in added(average).items()},
        slow={name: p.detach() for name, p in added(slow).items()},
    )


# What the processes do


def everything(world: World, top: Path) -> Found:
    engine_module.AT_ONCE = 5000  # ZeRO-3 would take a buffer a thousand times as large as all
    found = Found()
    for name, engine in LAYOUTS[world.size].items():
        found.lives[name] = live(engine, world, save=top / f"{name} x{world.size}")
        found.views[name] = views(engine, world)
    for name, engine in LAYOUTS[2].items():
        for saved in LAYOUTS[2] if world.size == 2 else ("zero3",):
            if name in LAYOUTS[world.size]:
                found.lives[f"{name} after {saved}"] = live(
                    engine, world, resume=top / f"{saved} x2"
                )
    if world.size == 2:
        for name, engine in LAYOUTS[2].items():
            found.teachers |= {
                f"{name} {kind}": with_teacher(trial(engine, kind), world)
                for kind in ("self", "frozen")
            }
            half = replace(engine, precision=Precision.bf16)
            average = Averages(slow=0.9, bf16=name == "zero3")
            found.halves[name] = run(trial(half, average=average), world, steps=LAST)
            for adapter in (LORA, NoAdapter()):
                found.held[f"{name} {type(adapter).__name__}"] = held(half, adapter, world)
    return found


def live(
    engine: Engine, world: World, *, save: Path | None = None, resume: Path | None = None
) -> Life:
    """Begin a run, saving it on the way, or go on with one; to the end."""
    settings, progress = trial(engine), Progress()
    sharded = settings.shard(world)
    if resume is not None:
        for span in sharded.spans():  # so that only what is read can be right
            span.local.detach().add_(0.3)
        assert checkpoints(resume, sharded, progress, world).resume(must=True)
    went = []
    while progress.step < LAST:
        went.append(settings.learn(sharded, progress.step, world))
        progress.advance(BATCH)
        if save is not None and progress.step == SAVED:
            saves = checkpoints(save, sharded, progress, world)
            saves.write()
            saves.finish()
    return Life(
        losses=[loss for loss, _ in went],
        norms=[norm for _, norm in went],
        end={kind: whole(sharded, kind) for kind in ("model", "average", "slow")},
        fingerprint=fingerprint(sharded),
    )


def views(engine: Engine, world: World) -> dict[str, Any]:
    """Take the same steps, and ask all networks before each."""
    settings = trial(engine)
    sharded = settings.shard(world)
    batch, t = batch_of(range(2), 0), torch.tensor([1.0, 0.6])
    with torch.no_grad():
        diagonal = sharded.student(batch.data, t, t, batch.cond)
    answers, losses = [], []
    for step in range(LAST):
        answers.append(ask_all(sharded))
        losses.append(settings.learn(sharded, step, world)[0])
    return {
        "before": answers[0],
        "after": answers[-1],
        "diagonal": diagonal,
        "losses": losses,
        "frozen": sharded.frozen,
        "shapes": sharded.shapes(),
        "spans": [(span.kind, span.name) for span in sharded.spans()],
    }


@torch.no_grad()
def ask_all(sharded: Sharded) -> dict[str, Tensor]:
    """Ask every network alike, off the diagonal, and the base."""
    assert sharded.base is not None
    networks: dict[str, Velocity] = {**sharded.networks(), "base": sharded.base}
    batch, t = batch_of(range(2), 0), torch.tensor([1.0, 0.6])
    return {name: network(batch.data, t, t / 3, batch.cond) for name, network in networks.items()}


def with_teacher(settings: Trial, world: World) -> dict[str, Any]:
    """Run with a teacher that is the student, or the base."""
    sharded = settings.shard(world)
    went = [settings.learn(sharded, step, world) for step in range(LAST)]
    return {
        "losses": [loss for loss, _ in went],
        "model": whole(sharded, "model"),
        "kinds": {span.kind for span in sharded.spans()},
        "names": set(sharded.networks()),
        "is student": sharded.teacher is sharded.student,
    }


def held(engine: Engine, adapter: Adapter, world: World) -> dict[str, int]:
    """Count this rank's bytes by what they are for, of a network of middle size in bfloat16."""
    before = alive()
    settings = trial(engine, adapter=adapter, average=Averages())
    sharded = settings.shard(world, size=MIDDLE)
    more = alive() - before
    spans = sum(span.local.nbytes for span in sharded.spans())
    return {"all": more, "spans": spans, "frozen": sharded.frozen}


def alive() -> int:
    """Sum up the bytes of all real numbers that this process holds."""
    gc.collect()
    tensors: list[Tensor] = []
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and not each.is_meta and each.is_floating_point():
            local = each.to_local() if type(each).__name__ == "DTensor" else each
            tensors.append(local.detach())
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    top = tmp_path_factory.mktemp("runs")
    results = {}
    with pytest.MonkeyPatch.context() as env:
        for ranks in (2, 1):
            # One process checks the shapes; checks are half of the time.
            env.setenv("TWINFLOW_TYPE_HOOK", "0" if ranks > 1 else "1")
            results[ranks] = spawn(everything, ranks, top, timeout_seconds=500)
    return results


def beyond(allowed: dict[str, float], far: dict[str, float]) -> dict[str, float]:
    return {key: distance for key, distance in far.items() if distance > allowed[key]}


def each_engine(found: dict[int, list[Found]]) -> list[tuple[Life, dict[str, Any]]]:
    """Give the life and the views of every engine on every number of ranks."""
    return [
        (ranks[0].lives[name], ranks[0].views[name])
        for ranks in found.values()
        for name in ranks[0].views
    ]


# Equality


@pytest.mark.parametrize(("ranks", "name"), [(1, "fsdp2"), (2, "fsdp2"), (2, "zero3")])
def test_every_layout_is_one_plain_process_with_a_network_each(
    found: dict[int, list[Found]], ranks: int, name: str
) -> None:
    ours = found[ranks][0].lives[name].outcome()
    assert beyond(NEAR, ours.worst(plain("average"))) == {}


def test_the_plain_run_trains_and_its_averages_lag() -> None:
    start, end = added(plain_network(adapted=True)), plain("average")
    still = {name for name, p in start.items() if torch.equal(end.model[name], p)}
    # Nothing reads what the last block's text asks for; weight decay leaves a B of zero alone.
    assert still == {"transformer_blocks.1.attn.add_q_proj.lora_B.weight"}
    assert apart(end.model, end.average) > apart(end.model, end.slow) > 1e-4
    assert min(end.norms) < OPTIM.clip < max(end.norms)
    with torch.no_grad():
        net, base = plain_network(adapted=True), plain_network(adapted=False)
        batch, t = batch_of(range(2), 0), torch.tensor([0.8, 0.3])
        first = base(batch.data, t, t, batch.cond)
        assert torch.equal(net(batch.data, t, t, batch.cond), first)
        for name, p in added(net).items():
            p.copy_(end.model[name])
        assert not torch.equal(net(batch.data, t, t, batch.cond), first)


@pytest.mark.parametrize("kind", ["self", "frozen"])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_teacher_that_is_the_student_or_the_base_costs_no_state(
    found: dict[int, list[Found]], engine: str, kind: str
) -> None:
    ours, theirs = found[2][0].teachers[f"{engine} {kind}"], plain(kind)
    assert ours["losses"] == pytest.approx(theirs.losses, rel=1e-6)
    assert apart(ours["model"], theirs.model) < 1e-6
    assert ours["kinds"] == {"model", "slow", "exp_avg", "exp_avg_sq"}
    assert ours["names"] == {"raw", "slow"}
    assert ours["is student"] == (kind == "self")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_in_bfloat16_it_is_near_float32(found: dict[int, list[Found]], engine: str) -> None:
    far = found[2][0].halves[engine].worst(plain("average"))
    assert beyond(ROUNDED, far) == {}
    assert far["loss"] > 1e-5


# Views


def test_at_the_start_all_networks_are_the_base(found: dict[int, list[Found]]) -> None:
    for _, told in each_engine(found):
        assert torch.equal(told["diagonal"], told["before"]["base"])
        assert torch.equal(told["before"]["raw"], told["before"]["ema"])
        assert torch.equal(told["before"]["raw"], told["before"]["slow"])


def test_the_base_stays_and_the_others_move(found: dict[int, list[Found]]) -> None:
    for _, told in each_engine(found):
        assert torch.equal(told["after"]["base"], told["before"]["base"])
        moved = {name: told["after"][name] - told["before"][name] for name in told["after"]}
        ema, slow, raw = (float(moved[name].abs().mean()) for name in ("ema", "slow", "raw"))
        assert 0 < ema < slow < raw


def test_asking_all_networks_does_not_disturb_training(found: dict[int, list[Found]]) -> None:
    for undisturbed, looked_at in each_engine(found):
        assert undisturbed.losses == looked_at["losses"]


# State


def test_only_what_is_trained_is_state(found: dict[int, list[Found]]) -> None:
    names = set(added(plain_network(adapted=True)))
    plainly = dict(SIZE.build().named_parameters())
    second = sum(p.numel() for own, p in plainly.items() if ".embed_r." in own)
    for _, told in each_engine(found):
        assert set(told["shapes"]) == names
        assert told["frozen"] == sum(p.numel() for p in plainly.values()) - second
        kinds = ("model", "average", "slow", "exp_avg", "exp_avg_sq")
        assert sorted(told["spans"]) == sorted((kind, name) for kind in kinds for name in names)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_run_goes_on_bit_for_bit(found: dict[int, list[Found]], engine: str) -> None:
    for rank in found[2]:
        undisturbed, resumed = rank.lives[engine], rank.lives[f"{engine} after {engine}"]
        assert resumed.losses == undisturbed.losses[SAVED:]
        assert resumed.fingerprint == undisturbed.fingerprint


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(2, "zero3 after fsdp2"), (2, "fsdp2 after zero3"), (1, "fsdp2 after zero3")],
)
def test_another_engine_and_another_number_of_ranks_go_on_alike(
    found: dict[int, list[Found]], ranks: int, name: str
) -> None:
    ours, theirs = found[ranks][0].lives[name], found[2][0].lives[name.split()[-1]]
    assert ours.losses == pytest.approx(theirs.losses[SAVED:], rel=1e-6)
    assert all(apart(ours.end[kind], theirs.end[kind]) < 1e-6 for kind in ours.end)


# Memory


@pytest.mark.parametrize(("engine", "moving"), [("fsdp2", 16), ("zero3", 24)])
def test_the_base_is_held_once_in_two_bytes_a_number(
    found: dict[int, list[Found]], engine: str, moving: int
) -> None:
    """What is trained: master, average and two moments, 16 bytes; with ZeRO-3 also a gradient and,
    of student and average, what they are gathered from."""
    (one,) = LORA.assemble(MIDDLE, ["average"])
    base = sum(p.numel() for kind, _, p in one.tensors() if kind == BASE)
    trained = sum(p.numel() for kind, _, p in one.tensors() if kind == "model")
    assert trained < 0.2 * base
    ours = [rank.held[f"{engine} LoRA"] for rank in found[2]]
    full = [rank.held[f"{engine} NoAdapter"] for rank in found[2]]
    assert [rank["frozen"] for rank in ours] == [base, base]
    assert sum(rank["spans"] for rank in ours) == 16 * trained
    held_bytes = sum(rank["all"] for rank in ours)
    assert held_bytes == pytest.approx(2 * base + moving * trained, rel=0.05)
    assert held_bytes < 0.3 * sum(rank["all"] for rank in full)
