"""ZeRO-3 trains as one plain process and FSDP2 do, and each goes on where the other stopped.

Each number of processes runs everything once; the tests look at what came out.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import twinflow_train.engines.zero3 as engine_module
from tests.engines.tools import (
    BATCH,
    OPTIM,
    SIZE,
    STEPS,
    Outcome,
    State,
    Trial,
    apart,
    fsdp2,
    objective,
    run,
    run_plainly,
    weights,
    whole,
)
from tests.helpers import spawn
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine, Precision, Sharded
from twinflow_train.engines.optim import AdamW8bit, RAdam
from twinflow_train.engines.zero3 import ShardedZeRO3, ZeRO3
from twinflow_train.errors import UserError

TOP = Path(__file__).parent.parent.parent

TRIALS: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    1: {
        "recompute": (4, {"recompute": 1}),
        "host optimizer": (8, {"recompute": 2, "offload_optimizer": True}),
    },
    2: {
        "keep all": (4, {}),
        "recompute": (2, {"recompute": 1}),
        "host memory": (2, {"recompute": 1, "offload_optimizer": True, "offload_weights": True}),
    },
    4: {"recompute": (1, {"recompute": 1})},
}
"""For each number of ranks some layouts: micro-batch, and how the engine differs from the usual."""

LAYOUTS = [(ranks, name) for ranks, trials in TRIALS.items() for name in trials]
NEAR = {"loss": 1e-6, "norm": 1e-6, "model": 1e-6, "average": 1e-6}
"""Losses and norms relative, weights absolute: float32 sums in another order."""

UNCLIPPED = RAdam(lr=2e-3, clip=0.0, eps=1e-5)
HALVES: dict[str, tuple[dict[str, Any], Averages]] = {
    "bf16": ({}, Averages()),
    "reduced so": ({"bf16_reduce": True}, Averages()),
    "averaged so": ({"offload_weights": True}, Averages(bf16=True, offload=True)),
}
"""Runs in bfloat16: how the engine differs, and how averages are held."""

Piece = tuple[tuple[int, ...], int, Tensor]
"""Shape of the whole, where the part begins, its numbers."""


def zero3(**changes: Any) -> ZeRO3:
    """Give ZeRO-3 in float32 without recomputation."""
    settings: dict[str, Any] = {"precision": Precision.fp32, "recompute": 0}
    return ZeRO3(**(settings | changes))


@dataclass(kw_only=True)
class Life:
    """A run with a checkpoint on its way: parts of the state as they were read and saved.

    went: loss and norm of each step. model, average, slow: whole at the end, on rank 0.
    """

    read: dict[str, Piece] = field(default_factory=dict)
    saved: dict[str, Piece] = field(default_factory=dict)
    went: dict[int, tuple[float, float]] = field(default_factory=dict)
    end: dict[str, State] = field(default_factory=dict)


@dataclass(kw_only=True)
class Found:
    """What one rank of one number of processes found out."""

    outcomes: dict[str, Outcome]
    lives: dict[str, Life]
    begun: dict[str, Any]
    halves: dict[str, Outcome] = field(default_factory=dict)
    unclipped: list[Outcome] = field(default_factory=list)
    teachers: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)


def on_two(world: World, top: Path) -> Found:
    # Small, so that there are several buckets, and tensors that are larger than one.
    engine_module.AT_ONCE = 1500
    with warnings.catch_warnings(record=True) as caught:
        found = Found(outcomes=outcomes(world), lives={}, begun=begun(world))
    found.warned = [str(warning.message) for warning in caught]
    half = zero3(precision=Precision.bf16, recompute=1)
    found.lives = {
        "fsdp2": live(fsdp2(), world, save=top / "fsdp2", until=(2, 4)),
        "zero3": live(zero3(), world, resume=top / "fsdp2", save=top / "zero3", until=(3, 4)),
        "half": live(half, world, save=top / "half", until=(2, 4)),
        "half again": live(half, world, resume=top / "half", until=(4, 4)),
    }
    found.halves = {
        name: run(
            Trial.of(
                4, engine=zero3(precision=Precision.bf16, recompute=1, **settings), average=average
            ),
            world,
            steps=3,
        )
        for name, (settings, average) in HALVES.items()
    }
    found.unclipped = [
        run(Trial.of(4, engine=engine, optim=UNCLIPPED), world, steps=3)
        for engine in (zero3(), fsdp2())
    ]
    found.teachers = teachers(world)
    found.left = left(world)
    return found


def on_another_number(world: World, top: Path) -> Found:
    found = Found(outcomes=outcomes(world), lives={}, begun=begun(world))
    found.lives["zero3"] = live(zero3(), world, resume=top / "zero3", until=(4, 4))
    if world.size == 1:
        found.lives["fsdp2"] = live(fsdp2(), world, resume=top / "zero3", until=(4, 4))
    return found


def outcomes(world: World) -> dict[str, Outcome]:
    return {
        name: run(Trial.of(micro, engine=zero3(**settings)), world)
        for name, (micro, settings) in TRIALS[world.size].items()
    }


def live(
    engine: Engine,
    world: World,
    *,
    resume: Path | None = None,
    save: Path | None = None,
    until: tuple[int, int],
) -> Life:
    """Resume a run or begin one, save it at the first step of `until`, and go on to the second."""
    trial = Trial.of(2, engine=engine, average=Averages(slow=0.9))
    sharded, progress, life = trial.shard(world, seed=99 if resume else 0), Progress(), Life()
    if resume is not None:
        assert checkpoints(resume, sharded, progress, world).resume(must=True)
        life.read = pieces(sharded)
    for end in until:
        while progress.step < end:
            life.went[progress.step] = trial.learn(sharded, progress.step, world)
            progress.advance(BATCH)
        if save is not None and end == until[0]:
            saves = checkpoints(save, sharded, progress, world)
            saves.write()
            saves.finish()
            life.saved = pieces(sharded)
    life.end = {kind: whole(sharded, kind) for kind in ("model", "average", "slow")}
    return life


def checkpoints(folder: Path, sharded: Sharded, progress: Progress, world: World) -> Checkpoints:
    return Checkpoints(
        folder=folder, engine=sharded, progress=progress, world=world, identity={"seed": 0}
    )


def pieces(sharded: Sharded) -> dict[str, Piece]:
    return {
        f"{span.kind}/{span.name}": (span.shape, span.offset, span.local.detach().clone())
        for span in sharded.spans()
    }


def begun(world: World) -> dict[str, Any]:
    """Look at engines before their first step: one computes in float32, the other does not."""
    found: dict[str, Any] = {}
    for precision in Precision if world.size == 2 else [Precision.fp32]:
        before = alive()
        sharded = Trial.of(1, engine=zero3(precision=precision)).shard(world)
        more = alive() - before
        found[precision.name] = {
            "bytes": more - 4 * engine_module.AT_ONCE,
            "numbers": numbers(sharded),
            "model": whole(sharded, "model"),
            "average": whole(sharded, "average"),
            "shapes": sharded.shapes(),
            "networks": list(sharded.networks()),
            "pieces": pieces(sharded),
        }
    return found


def alive() -> int:
    """Sum up the bytes of all real numbers that this process holds."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    real = [t for t in tensors if t.is_floating_point() and not t.is_meta]
    storages = [tensor.untyped_storage() for tensor in real]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def numbers(sharded: Sharded) -> tuple[int, int, int]:
    """Count what this rank holds, padding included: trained, frozen, averaged."""
    assert isinstance(sharded, ShardedZeRO3)
    model, average = (sharded._parts[kind] for kind in ("model", "average"))
    trained = sum(len(part.state) for part in model if part.moments)
    frozen = sum(len(part.state) for part in model if not part.moments)
    return trained, frozen, sum(len(part.state) for part in average)


def teachers(world: World) -> dict[str, Any]:
    """Train with the student as its own teacher, and with a frozen one."""
    own = Trial.of(4, engine=zero3(), objective=objective(teacher_decay=0.0))
    sharded = own.shard(world)
    found: dict[str, Any] = {
        "self": sharded.teacher is sharded.student,
        "self kinds": {span.kind for span in sharded.spans()},
        "self names": set(sharded.networks()),
        "self loss": own.learn(sharded, 0, world)[0],
    }
    kept = Trial.of(4, engine=zero3(), objective=objective(teacher_decay=1.0))
    sharded = kept.shard(world)
    start = whole(sharded, "frozen")
    kept.learn(sharded, 0, world)
    return found | {
        "kept is student": sharded.teacher is sharded.student,
        "kept names": set(sharded.networks()),
        "kept moved": apart(whole(sharded, "frozen"), start),
        "student moved": apart(whole(sharded, "model"), start),
    }


def left(world: World) -> dict[str, Any]:
    """Look at what a step with recomputation leaves gathered, and in DeepSpeed's notes."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    trial = Trial.of(2, engine=zero3(recompute=1))
    sharded, notes = trial.shard(world), []
    for step in range(2):
        trial.learn(sharded, step, world)
        notes.append(len(FWD_MODULE_STACK))
    discarded = {}
    for name, engine in {"gpu": zero3(), "host": zero3(offload_optimizer=True)}.items():
        again = Trial.of(2, engine=engine).shard(world)
        trial.backward(again, 0, world)
        norm = float(again.discard())
        discarded[name] = norm, trial.learn(again, 0, world)[1]
    networks: list[Any] = [sharded.student, sharded.teacher]
    gathered = sum(p.numel() for network in networks for p in network.parameters())
    return {
        "notes": notes,
        "gathered": gathered,
        "networks": len(set(networks)),
        "discarded": discarded,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    top = tmp_path_factory.mktemp("runs")
    results: dict[int, list[Found]] = {}
    with pytest.MonkeyPatch.context() as env:
        for ranks, function in ((2, on_two), (1, on_another_number), (4, on_another_number)):
            # One process checks the shapes; checks are half of the time.
            env.setenv("TWINFLOW_TYPE_HOOK", "0" if ranks > 1 else "1")
            results[ranks] = spawn(function, ranks, top, timeout_seconds=500)
    return results


@cache
def plain(steps: int = STEPS) -> Outcome:
    return run_plainly(Trial.of(8), steps=steps)


def near(one: Outcome, other: Outcome) -> dict[str, float]:
    """Return what is further apart than it may be."""
    return {key: far for key, far in one.worst(other).items() if far > NEAR[key]}


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_every_layout_gives_the_results_of_one_plain_process(
    found: dict[int, list[Found]], ranks: int, layout: str
) -> None:
    assert max(plain().norms) > OPTIM.clip, "no step is clipped: the comparison would not see it"
    assert near(found[ranks][0].outcomes[layout], plain()) == {}


def test_every_rank_sees_the_global_loss_and_norm(found: dict[int, list[Found]]) -> None:
    for ranks in (2, 4):
        first, *others = (each.outcomes for each in found[ranks])
        for other in others:
            for name, outcome in other.items():
                assert outcome.losses == first[name].losses
                assert outcome.norms == first[name].norms


def test_another_optimizer_without_clipping_gives_the_results_of_fsdp2(
    found: dict[int, list[Found]],
) -> None:
    ours, theirs = found[2][0].unclipped
    assert near(ours, theirs) == {}
    assert max(ours.norms) > OPTIM.clip


@pytest.mark.parametrize("name", list(HALVES))
def test_bfloat16_stays_within_its_tolerance_of_float32(
    found: dict[int, list[Found]], name: str
) -> None:
    half = found[2][0].halves[name]
    assert {tensor.dtype for tensor in half.model.values()} == {torch.float32}
    kept = torch.bfloat16 if HALVES[name][1].bf16 else torch.float32
    assert {tensor.dtype for tensor in half.average.values()} == {kept}
    far = half.worst(plain(3))
    assert far["loss"] < 0.03
    assert far["norm"] < 0.1
    assert far["model"] < 4 * OPTIM.lr
    # Weights are near 1, and bfloat16 is rounded in steps of 1/128 there, up or down.
    assert far["average"] < (6 / 128 if HALVES[name][1].bf16 else 4 * OPTIM.lr)
    # It is not float32 under another name.
    assert far["loss"] > 1e-5


def test_gradients_are_reduced_in_bfloat16_only_if_asked_for(
    found: dict[int, list[Found]],
) -> None:
    first, second = (found[2][0].halves[name] for name in ("bf16", "reduced so"))
    assert first.losses[0] == second.losses[0]
    assert first.norms[0] != second.norms[0]
    assert first.norms[0] == pytest.approx(second.norms[0], rel=1e-2)


@pytest.mark.parametrize(
    ("ranks", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16"), (4, "fp32")]
)
def test_a_start_is_the_given_weights_in_float32(
    found: dict[int, list[Found]], ranks: int, precision: str
) -> None:
    begun, net, values = found[ranks][0].begun[precision], SIZE.build(), weights()
    want: State = {
        net.stored_name(name): values.read(net.stored_name(name), p.shape, 0, len(p))
        for name, p in net.named_parameters()
    }
    assert apart(begun["model"], want) == 0
    assert apart(begun["average"], want) == 0
    assert begun["shapes"] == {name: tuple(tensor.shape) for name, tensor in want.items()}
    assert begun["networks"] == ["raw", "ema"]
    whole_state = assembled(each.begun[precision]["pieces"] for each in found[ranks])
    kinds = {"model", "average", "exp_avg", "exp_avg_sq"}
    trained = {net.stored_name(name) for name, p in net.named_parameters() if p.requires_grad}
    assert {key.partition("/")[0] for key in whole_state} == kinds
    for key, tensor in whole_state.items():
        kind, _, name = key.partition("/")
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, want[name] if kind in ("model", "average") else 0 * want[name])
    assert {key for key in whole_state if key.startswith("exp_avg/")} == {
        f"exp_avg/{name}" for name in trained
    }
    assert len(want) - len(trained) == 6


@pytest.mark.parametrize(("precision", "each"), [("fp32", (20, 4, 4)), ("bf16", (18, 6, 6))])
def test_a_number_takes_as_many_bytes_as_documented(
    found: dict[int, list[Found]], precision: str, each: tuple[int, int, int]
) -> None:
    for rank in found[2]:
        begun = rank.begun[precision]
        assert begun["numbers"][0] > 10_000
        want = sum(n * wide for n, wide in zip(begun["numbers"], each, strict=True))
        assert begun["bytes"] == pytest.approx(want, rel=0.002)


def assembled(parts: Iterable[Mapping[str, Piece]]) -> State:
    """Put the ranks' pieces together; every number has to be there once."""
    tensors: State = {}
    ends: dict[str, int] = {}
    for part in parts:
        for key, (shape, offset, numbers) in part.items():
            assert offset == ends.get(key, 0)
            ends[key] = offset + len(numbers)
            whole = tensors.setdefault(key, torch.empty(shape, dtype=numbers.dtype))
            whole.view(-1)[offset : ends[key]] = numbers
    assert all(ends[key] == tensor.numel() for key, tensor in tensors.items())
    return tensors


def at(found: dict[int, list[Found]], ranks: int, name: str, what: str) -> State:
    """Put together the state of a life as it was read or saved, of float32 and float32 again."""
    parts: list[dict[str, Piece]] = [vars(each.lives[name])[what] for each in found[ranks]]
    tensors: State = {}
    for part in parts:
        for key, (shape, offset, numbers) in part.items():
            whole = tensors.setdefault(key, torch.full(shape, torch.nan))
            whole.view(-1)[offset : offset + len(numbers)] = numbers
    return tensors


MOVES = [
    ((2, "fsdp2"), (2, "zero3")),
    ((2, "zero3"), (1, "fsdp2")),
    ((2, "zero3"), (1, "zero3")),
    ((2, "zero3"), (4, "zero3")),
    ((2, "half"), (2, "half again")),
]
"""Who saved a checkpoint, and who read it: ranks and name."""


@pytest.mark.parametrize(("saver", "reader"), MOVES)
def test_everything_saved_comes_back_exactly_in_either_engine(
    found: dict[int, list[Found]], saver: tuple[int, str], reader: tuple[int, str]
) -> None:
    theirs, ours = at(found, *saver, "saved"), at(found, *reader, "read")
    kinds = {"model", "average", "slow", "exp_avg", "exp_avg_sq"}
    assert {key.partition("/")[0] for key in ours} == kinds
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert sum(int(ours[key].count_nonzero()) for key in ours if key.startswith("exp_avg/")) > 100


@pytest.mark.parametrize("reader", [(2, "zero3"), (1, "fsdp2"), (1, "zero3"), (4, "zero3")])
def test_a_run_goes_on_alike_in_either_engine(
    found: dict[int, list[Found]], reader: tuple[int, str]
) -> None:
    """As FSDP2 does that never stopped, with weights, averages and moments."""
    ranks, name = reader
    straight, ours = found[2][0].lives["fsdp2"], found[ranks][0].lives[name]
    assert min(ours.went) > 0
    assert max(ours.went) == max(straight.went) == 3
    for step, (loss, norm) in ours.went.items():
        assert loss == pytest.approx(straight.went[step][0], rel=1e-5)
        assert norm == pytest.approx(straight.went[step][1], rel=1e-5)
    for kind, state in straight.end.items():
        assert len(state) > 10
        assert apart(ours.end[kind], state) < 2e-6


def test_what_computes_in_bfloat16_goes_on_bit_for_bit(found: dict[int, list[Found]]) -> None:
    own, again = found[2][0].lives["half"], found[2][0].lives["half again"]
    assert again.went == {step: own.went[step] for step in (2, 3)}
    for kind, state in own.end.items():
        assert apart(again.end[kind], state) == 0


def test_a_teacher_of_decay_0_is_the_student(found: dict[int, list[Found]]) -> None:
    for each in found[2]:
        assert each.teachers["self"]
        assert each.teachers["self names"] == {"raw"}
        assert each.teachers["self kinds"] == {"model", "exp_avg", "exp_avg_sq"}
        assert each.teachers["self loss"] > 0


def test_a_teacher_of_decay_1_stays_as_it_was(found: dict[int, list[Found]]) -> None:
    teachers = found[2][0].teachers
    assert teachers["kept moved"] == 0
    assert teachers["student moved"] > 1e-4
    assert teachers["kept names"] == {"raw"}
    assert not teachers["kept is student"]


def test_a_step_leaves_nothing_behind(found: dict[int, list[Found]]) -> None:
    for each in found[2]:
        assert each.left["networks"] == 2
        assert each.left["gathered"] == 0
        assert each.left["notes"][1] == each.left["notes"][0]
        for discarded, stepped in each.left["discarded"].values():
            assert 0 < discarded == pytest.approx(stepped, rel=1e-6)


SCRIPT = """
from tests.engines.tools import Trial, run
from twinflow_train import dist
from twinflow_train.engines.optim import RAdam
from twinflow_train.engines.zero3 import ShardedZeRO3, ZeRO3
for _ in range(2):
    with dist.start() as world:
        run(Trial.of(8, engine=ZeRO3(), optim=RAdam()), world, steps=1)
"""


def test_it_is_quiet_with_and_without_a_launcher(found: dict[int, list[Found]]) -> None:
    """Two runs, one after the other in one process that nobody launched, say nothing."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=TOP,
        env=env | {"TWINFLOW_TYPE_HOOK": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    for each in found[2]:
        assert each.warned == []


LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        (zero3(), {"optim": AdamW8bit()}, "optim=adamw8bit does not work with engine=zero3"),
        (zero3(), {"average": Averages(bf16=True)}, "average.bf16 with engine=zero3 needs"),
    ],
)
def test_what_zero3_cannot_do_is_refused_in_a_line(
    engine: ZeRO3, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Trial.of(8, engine=engine, **settings).shard(ALONE)
    assert "\n" not in str(caught.value)


def test_keeping_products_is_refused_by_key() -> None:
    with pytest.raises(UserError, match=r"engine.keep_products does not work with engine=zero3"):
        zero3(recompute=1, keep_products=True)
