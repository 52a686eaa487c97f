"""One GPU, no shards: the same training where it can be the same, and what it gives up elsewhere.

A process with torchao goes through what takes one; the tests look at what came out.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.checkpoint.tools import ALONE, IDENTITY
from tests.engines.tools import (
    BATCH,
    LATENT,
    OPTIM,
    SEED,
    SIZE,
    Outcome,
    State,
    Trial,
    apart,
    batch_of,
    fsdp2,
    network,
    objective,
    weights,
    whole,
)
from tests.helpers import spawn
from tests.test_run import composed
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.engines.base import Engine, Precision, Sharded
from twinflow_train.engines.optim import AdamW, AdamW8bit, Optim
from twinflow_train.engines.pieces import Trained, advance, now_of, rule_of
from twinflow_train.engines.rounding import keys
from twinflow_train.engines.single import Single
from twinflow_train.errors import UserError
from twinflow_train.models.adapter import NoAdapter
from twinflow_train.rng import generator

# Rows of most matrices are whole blocks of 8-bit moments.
WIDE = replace(SIZE, layers=1, heads=4, head_dim=64, rope=[16, 24, 24], patch=1)
UNCLIPPED = replace(OPTIM, clip=0.0)
EIGHT = AdamW8bit(**asdict(UNCLIPPED))
SAVED, END = 1, 2


def trial(engine: Engine, optim: Optim = UNCLIPPED) -> Trial:
    return Trial.of(BATCH, engine=engine, optim=optim, objective=objective(teacher_decay=0.0))


def single(**changes: Any) -> Single:
    return Single(**({"precision": Precision.fp32} | changes))


# The same training


ENGINES: dict[str, tuple[Engine, Optim]] = {
    "fsdp2": (fsdp2(recompute=1), UNCLIPPED),
    "single": (single(), UNCLIPPED),
    "kept, never clipped": (single(recompute=0), replace(OPTIM, clip=1e6)),
    "bf16": (single(precision=Precision.bf16), UNCLIPPED),
    "bf16 of fsdp2": (fsdp2(precision=Precision.bf16, recompute=1), UNCLIPPED),
}
STEPS = 3


@dataclass(kw_only=True)
class Twice:
    """Gradient norm and weights after a step whose loss calls the student twice."""

    norm: float
    model: State


def twice(engine: Sharded) -> Twice:
    """Take a step of two calls in one graph, at other times and of other samples."""
    batch, t = batch_of(range(4), 0), torch.linspace(0.2, 0.8, 4)
    engine.begin(1e-3)
    first = engine.student(batch.data, t, t, batch.cond)
    second = engine.student(first, t / 2, t / 3, batch.cond)
    engine.backward((first - second).square().mean(), last=True)
    return Twice(norm=float(engine.step(1e-3).norm), model=whole(engine, "model"))


@dataclass(kw_only=True)
class Found:
    """What runs of each engine came to, and steps with two calls."""

    outcomes: dict[str, Outcome]
    twice: dict[str, Twice]
    crossed: dict[str, State] = field(default_factory=dict)


def plain_runs(world: World, top: Path) -> Found:
    found = Found(
        outcomes={},
        twice={name: twice(trial(*ENGINES[name]).shard(world)) for name in ("fsdp2", "single")},
    )
    engines = {}
    for name, each in ENGINES.items():
        engine = engines[name] = trial(*each).shard(world)
        pairs = [trial(*each).learn(engine, step, world) for step in range(STEPS)]
        losses, norms = ([pair[n] for pair in pairs] for n in range(2))
        model = whole(engine, "model")
        found.outcomes[name] = Outcome(losses=losses, norms=norms, model=model, average={})
    # From one engine's checkpoint to the other.
    for one, other in (("fsdp2", "bf16"), ("bf16", "fsdp2")):
        saves = checkpoints(top / one, engines[one], Progress(step=STEPS), world)
        saves.write()
        saves.finish()
        found.crossed[f"{one} saved"] = state(engines[one])
        read = trial(*ENGINES[other]).shard(world, seed=9)
        assert checkpoints(top / one, read, Progress(), world).resume(must=True)
        assert read.updates == STEPS
        found.crossed[f"{other} read"] = state(read)
    return found


def state(engine: Sharded) -> State:
    return {f"{span.kind}/{span.name}": span.local.detach().clone() for span in engine.spans()}


def checkpoints(folder: Path, engine: Sharded, progress: Progress, world: World) -> Checkpoints:
    return Checkpoints(
        folder=folder, engine=engine, progress=progress, world=world, identity=IDENTITY
    )


def go_on(one: Trial, engine: Sharded, progress: Progress, until: int) -> list[float]:
    went = []
    while progress.step < until:
        went.append(one.learn(engine, progress.step, ALONE)[0])
        progress.advance(BATCH)
    return went


def everything(world: World, beside: str, top: Path) -> tuple[Found, Coded]:
    found = plain_runs(world, top / "plain")  # imports diffusers, which would look for torchao
    sys.path.append(beside)
    return found, coded_runs(world, top / "coded")


@pytest.fixture(scope="module")
def both(beside: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Coded]:
    with pytest.MonkeyPatch.context() as env:
        env.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao would compile for minutes
        env.setenv("TWINFLOW_TYPE_HOOK", "0")
        ((plain, eight),) = spawn(
            everything, 1, beside, tmp_path_factory.mktemp("single"), timeout_seconds=300
        )
    assert isinstance(plain, Found)
    assert isinstance(eight, Coded)
    return plain, eight


@pytest.fixture(scope="module")
def found(both: tuple[Found, Coded]) -> Found:
    return both[0]


@pytest.fixture(scope="module")
def coded(both: tuple[Found, Coded]) -> Coded:
    return both[1]


@pytest.mark.parametrize("name", ["single", "kept, never clipped"])
def test_in_float32_it_is_the_ordinary_training(found: Found, name: str) -> None:
    far = found.outcomes[name].worst(found.outcomes["fsdp2"])
    assert far["loss"] < 1e-6
    assert far["norm"] < 1e-6
    assert far["model"] < 1e-6


def test_a_graph_that_uses_a_weight_twice_updates_it_once(found: Found) -> None:
    ours, ordinary = found.twice["single"], found.twice["fsdp2"]
    assert ours.norm == pytest.approx(ordinary.norm, rel=1e-6)
    assert apart(ours.model, ordinary.model) < 1e-6


def test_in_bfloat16_losses_fall_as_with_float32_masters(found: Found) -> None:
    ours, masters = found.outcomes["bf16"], found.outcomes["bf16 of fsdp2"]
    assert {tensor.dtype for tensor in ours.model.values()} == {torch.bfloat16}
    assert ours.losses == pytest.approx(masters.losses, rel=0.05)
    assert ours.losses != masters.losses
    # Weights near 1 lie 1/128 apart, and a step of three moved at most as many of them.
    assert apart({n: t.float() for n, t in ours.model.items()}, masters.model) < 4 / 128


def test_a_checkpoint_of_float32_masters_is_read_to_the_nearest(found: Found) -> None:
    saved, read = found.crossed["fsdp2 saved"], found.crossed["bf16 read"]
    assert saved.keys() == read.keys()
    for key, tensor in read.items():
        assert tensor.dtype == (torch.bfloat16 if key.startswith("model/") else torch.float32)
        assert torch.equal(tensor, saved[key].to(tensor.dtype)), key


def test_its_checkpoint_is_read_exactly_by_the_other(found: Found) -> None:
    saved, read = found.crossed["bf16 saved"], found.crossed["fsdp2 read"]
    assert saved.keys() == read.keys()
    assert [key for key in saved if not torch.equal(saved[key].float(), read[key])] == []


# Clipping


@dataclass(kw_only=True)
class Stepped:
    """Weights before and after a step, the gradient by textbook, and the norm told."""

    before: State
    gradient: State
    after: State
    norm: float


@cache
def clipped(clip: float) -> Stepped:
    """Take a step in which a number moves by gradient / (|gradient| + 1)."""
    optim = AdamW(lr=1e-2, betas=[0.0, 0.0], eps=1.0, clip=clip)
    one = trial(single(), optim)
    engine = one.shard(ALONE)
    net, before = network(engine), whole(engine, "model")
    gradients = textbook()
    engine.begin(1e-2)
    one.backward(engine, 0, ALONE)
    assert all(p.grad is None for p in net.parameters())
    norm = float(engine.step(1e-2).norm)
    return Stepped(before=before, gradient=gradients, after=whole(engine, "model"), norm=norm)


@cache
def textbook() -> State:
    """Give the gradient of the first step by a network of its own."""
    net, values = SIZE.build().to_empty(device="cpu"), weights()
    net.rebuild_constants()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(values.read(net.stored_name(name), p.shape, 0, len(p)))
    aim = objective(teacher_decay=0.0)
    deal = Deal(batch=BATCH, micro_batch=BATCH, ranks=1, rank=0)
    draws = aim.draw(deal, 0, seed=SEED, step=0, latent=LATENT)
    aim.loss(net, net, batch_of(range(BATCH), 0), draws).total.backward()
    return {net.stored_name(n): p.grad for n, p in net.named_parameters() if p.grad is not None}


def unit_of(name: str) -> str:
    """Name the block that a parameter belongs to, or what is in none."""
    return name.split(".")[1] if name.startswith("transformer_blocks.") else "rest"


def test_each_block_is_clipped_by_itself() -> None:
    clip = 0.3
    told = clipped(clip)
    units = {unit_of(name) for name in told.gradient}
    assert len(units) == SIZE.layers + 1
    lengths = {
        unit: math.sqrt(
            sum(float(g.square().sum()) for n, g in told.gradient.items() if unit_of(n) == unit)
        )
        for unit in units
    }
    most = clip / math.sqrt(len(units))
    assert any(length > most for length in lengths.values())
    for name, gradient in told.gradient.items():
        share = min(1.0, most / lengths[unit_of(name)])
        step = share * gradient / (share * gradient.abs() + 1)
        assert (told.after[name] - told.before[name] + 1e-2 * step).abs().max() < 1e-6, name
    assert told.norm == pytest.approx(math.hypot(*lengths.values()), rel=1e-5)


# Bad numbers, and what nothing is updated for


def bits(engine: Sharded) -> list[bytes]:
    """Give every bit of the state; numpy has no bfloat16."""
    return [span.local.detach().view(torch.uint8).numpy().tobytes() for span in engine.spans()]


def started(optim: Optim = UNCLIPPED, **changes: Any) -> tuple[Trial, Sharded]:
    one = trial(single(**changes), optim)
    return one, one.shard(ALONE)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(factor: float) -> None:
    one, engine = started(precision=Precision.bf16)
    one.learn(engine, 0, ALONE)
    before, updates = bits(engine), engine.updates
    batch, t = batch_of([0], 1), torch.full((1,), 0.5)
    engine.begin(1e-2)
    loss = engine.student(batch.data, t, t, batch.cond).square().mean()
    engine.backward(loss * factor, last=True)
    taken = engine.step(1e-2)
    assert not bool(taken.updated)
    assert not math.isfinite(float(taken.norm))
    assert (bits(engine), engine.updates) == (before, updates)
    _, again = started(precision=Precision.bf16)
    one.learn(again, 0, ALONE)
    assert one.learn(engine, 1, ALONE) == one.learn(again, 1, ALONE)
    assert bits(engine) == bits(again)


def test_a_block_of_bad_gradients_stays_and_the_others_are_updated() -> None:
    one, engine = started()
    block = network(engine).blocks[1]
    spoiled = next(p for p in block.parameters() if p.requires_grad)
    spoiled.register_hook(lambda gradient: gradient * math.nan)
    before = state(engine)
    _, norm = one.learn(engine, 0, ALONE)
    assert math.isnan(norm)
    assert engine.updates == 0
    after = state(engine)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert {key for key in moved if ".blocks.1." in key or "_blocks.1." in key} == set()
    trained = {f"model/{name}" for name in textbook() if unit_of(name) != "1"}
    assert {key for key in moved if key.startswith("model/")} == trained


def test_a_backward_pass_outside_of_a_step_only_measures() -> None:
    one, engine = started()
    before = bits(engine)
    one.backward(engine, 0, ALONE)
    norm = float(engine.discard())
    assert norm == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in textbook().values())), rel=1e-5
    )
    assert bits(engine) == before
    assert all(p.grad is None for p in network(engine).parameters())
    assert engine.updates == 0


def test_a_gradient_is_gone_before_the_next_block_begins() -> None:
    _, engine = started()
    net = network(engine)
    inside = {id(p): n for n, block in enumerate(net.blocks) for p in block.parameters()}
    seen: set[tuple[int, ...]] = set()

    def look(_: Tensor) -> None:
        alive = {inside[id(p)] for p in net.parameters() if p.grad is not None and id(p) in inside}
        seen.add(tuple(sorted(alive)))

    for p in net.parameters():
        if p.requires_grad:
            p.register_hook(look)
    engine.begin(1e-3)
    batch, t = batch_of([0, 1], 0), torch.full((2,), 0.5)
    engine.backward(engine.student(batch.data, t, t, batch.cond).square().mean(), last=True)
    assert seen == {(), (0,), (1,)}


# Codes of 8 bits, and resuming


@dataclass(kw_only=True)
class Coded:
    """What there is to compare with torchao: one tensor's state, and runs of both engines."""

    weights: Tensor
    moments: list[tuple[Tensor, ...]]
    losses: dict[str, list[float]]
    read: dict[str, tuple[State, State]]


GRADIENTS = 10
SHAPE = (96, 512)


def drawn(name: str) -> Tensor:
    return torch.randn(SHAPE, generator=generator("single", name))


def coded_runs(world: World, top: Path) -> Coded:
    """Do the same with torchao, and go from one engine to the other."""
    parameter = nn.Parameter(drawn("weights"))
    optimizer = torchaos(parameter)
    for n in range(GRADIENTS):
        parameter.grad = drawn(f"gradient {n}")
        optimizer.step()
    moments: Any = [optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")]
    losses, read = {}, {}
    engines: dict[str, Engine] = {"fsdp2": fsdp2(recompute=1), "single": single()}
    for name, engine in engines.items():
        one = trial(engine, EIGHT)
        sharded, progress = one.shard(world, size=WIDE), Progress()
        losses[name] = go_on(one, sharded, progress, SAVED)
        saves = checkpoints(top / name, sharded, progress, world)
        saves.write()
        saves.finish()
        other = "single" if name == "fsdp2" else "fsdp2"
        reader = trial(engines[other], EIGHT).shard(world, seed=9, size=WIDE)
        assert checkpoints(top / name, reader, progress, world).resume(must=True)
        read[name] = state(sharded), state(reader)
        losses[f"{name}, {other}"] = go_on(trial(engines[other], EIGHT), reader, progress, END)
        progress.step = SAVED
        losses[name] += go_on(one, sharded, progress, END)
    return Coded(
        weights=parameter.detach(),
        moments=[(each.codes, each.scale, each.qmap) for each in moments],
        losses=losses,
        read=read,
    )


def torchaos(parameter: nn.Parameter) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit as Torchao

    betas = (EIGHT.betas[0], EIGHT.betas[1])
    optimizer: torch.optim.Optimizer = Torchao(
        [parameter], lr=1e-2, betas=betas, eps=EIGHT.eps, weight_decay=EIGHT.weight_decay
    )
    return optimizer


def test_codes_and_scales_are_torchaos(coded: Coded) -> None:
    one, cpu = Trained(nn.Parameter(drawn("weights")), "weights", EIGHT), torch.device("cpu")
    for n in range(GRADIENTS):
        count = torch.tensor(n + 1)
        now, key = now_of(EIGHT, 1e-2, count), keys(count, 1)[0]
        one.step(drawn(f"gradient {n}"), advance, now=now, rule=rule_of(EIGHT, cpu), key=key)
    for ours, theirs, among in zip(
        one.moments, coded.moments, rule_of(EIGHT, cpu).tables, strict=True
    ):
        codes, scales, levels = theirs
        assert torch.equal(among.levels, levels)
        assert torch.equal(ours[0].view(SHAPE), codes)
        assert torch.equal(ours[1], scales)
    assert torch.allclose(one.parameter, coded.weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fsdp2", "single"])
def test_codes_go_from_one_engine_to_the_other(coded: Coded, name: str) -> None:
    saved, read = coded.read[name]
    assert saved.keys() == read.keys()
    assert any(tensor.dtype == torch.uint8 for tensor in saved.values())
    assert [key for key in saved if not torch.equal(saved[key].flatten(), read[key])] == []
    (crossed,) = (losses for key, losses in coded.losses.items() if key.startswith(f"{name}, "))
    assert crossed == pytest.approx(coded.losses[name][SAVED:], rel=1e-5)
    assert coded.losses["single"] == pytest.approx(coded.losses["fsdp2"], rel=1e-5)


@pytest.mark.parametrize("optim", [OPTIM, AdamW8bit(**asdict(OPTIM))], ids=["adamw", "8bit"])
def test_a_resumed_run_is_one_that_never_stopped_bit_for_bit(optim: Optim, tmp_path: Path) -> None:
    one = trial(single(precision=Precision.bf16), optim)
    engine, progress = one.shard(ALONE, size=WIDE), Progress()
    go_on(one, engine, progress, SAVED)
    saves = checkpoints(tmp_path, engine, progress, ALONE)
    saves.write()
    there = bits(engine)
    went = go_on(one, engine, progress, END)
    saves.finish()
    again, later = one.shard(ALONE, seed=9, size=WIDE), Progress()
    assert checkpoints(tmp_path, again, later, ALONE).resume(must=True)
    assert bits(again) == there
    assert go_on(one, again, later, END) == went
    assert bits(again) == bits(engine)
    assert again.updates == engine.updates == END


def test_a_checkpoint_with_other_moments_is_refused(tmp_path: Path) -> None:
    engine = trial(single(), EIGHT).shard(ALONE, size=WIDE)
    saves = checkpoints(tmp_path, engine, Progress(step=1), ALONE)
    saves.write()
    saves.finish()
    other = trial(single()).shard(ALONE, size=WIDE)
    with pytest.raises(UserError, match="or with another optim="):
        checkpoints(tmp_path, other, Progress(), ALONE).resume()


# Loading


def test_weights_are_loaded_without_a_second_copy() -> None:
    (assembly,) = NoAdapter().assemble(replace(WIDE, layers=3), [])
    values, sizes = weights(), [parameter.numel() for _, _, parameter in assembly.tensors()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        single(precision=Precision.bf16).fill(assembly, values, torch.device("cpu"))
    live = most = 0
    for size in allocations(seen):
        live += size
        most = max(most, live)
    assert live == pytest.approx(2 * sum(sizes), rel=0.01)
    # A tensor as it is drawn and as it is scaled, both in float32: far less than all of them.
    assert most - live < 9 * max(sizes) < sum(sizes)
    for _, name, parameter in assembly.tensors():
        want = values.read(name, parameter.shape, 0, parameter.shape[0])
        assert torch.equal(parameter, want.to(torch.bfloat16))


def allocations(seen: profile) -> list[int]:
    """List what the allocator handed out and took back, in bytes, in order."""
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events: list[Any] = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


# What it refuses


@pytest.mark.parametrize(
    ("words", "ranks", "said"),
    [
        ([], 8, "engine=single is for one GPU, and this job has 8: use engine=fsdp2"),
        (["micro_batch=4"], 1, "does not accumulate gradients: set micro_batch=32, the batch, or"),
        (["adapter=lora"], 1, "trains all weights: use adapter=none, or engine=fsdp2"),
        (["objective.teacher_decay=0.99"], 1, "set objective.teacher_decay=0"),
        (["average.slow=0.9"], 1, "holds one network: set average.slow=0"),
        (["optim=radam"], 1, "engine=single works with optim=adamw8bit and optim=adamw"),
        (["faults.skip_above=20"], 1, "set faults.skip_above=0"),
    ],
)
def test_what_cannot_go_with_it_is_refused_by_key(words: list[str], ranks: int, said: str) -> None:
    run = composed("experiment=qwen_image_full_single_gpu", *words)
    with pytest.raises(UserError, match=said):
        run.engine.check(run, ranks=ranks)


def test_a_compiler_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.compile is inducter; it must be null or one of"):
        single(compile="inducter")


def test_its_experiment_is_not_refused() -> None:
    run = composed("experiment=qwen_image_full_single_gpu")
    run.engine.check(run, ranks=1)
    assert isinstance(run.engine, Single)
    assert isinstance(run.optim, AdamW8bit)
    assert (run.batch, run.micro_batch, run.objective.teacher_decay) == (32, 32, 0)
    full = composed("experiment=qwen_image_full")
    for key in ("model", "steps", "batch", "init_from"):
        assert vars(run)[key] == vars(full)[key]
    assert vars(run.optim) == vars(full.optim)
    assert replace(run.objective, teacher_decay=0.99) == full.objective
