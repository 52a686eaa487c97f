"""FSDP2 is arithmetic-neutral: ranks, micro-batches and recomputation change no result.

Each number of processes runs everything once; the tests look at what came out.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engines.tools import (
    OPTIM,
    SIZE,
    Outcome,
    State,
    Trial,
    apart,
    fsdp2,
    network,
    objective,
    run,
    run_plainly,
    weights,
    whole,
)
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Precision
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW, RAdam

TRIALS: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    1: {
        "whole": (8, {}),
        "recompute": (2, {"recompute": 1}),
        "every second": (8, {"recompute": 2, "reshard": False}),
        "keep products": (4, {"recompute": 1, "keep_products": True}),
        "offload": (8, {"offload": True}),
    },
    2: {
        "gathered": (4, {"reshard": False}),
        "teacher gathered": (2, {"keep_teacher": True}),
        "recompute": (2, {"recompute": 1}),
        "replicas": (2, {"shard_over": 1}),
    },
    4: {
        "every second": (1, {"recompute": 2, "reshard": False}),
        "replicas": (1, {"shard_over": 2}),
    },
}
"""For each number of ranks some layouts: micro-batch, and how the engine differs from the usual."""

SLOW = 0.9
VARIANTS: dict[str, dict[str, Any]] = {
    "two averages in host memory": {"average": Averages(slow=SLOW, offload=True)},
    "RAdam": {"optim": RAdam(lr=0.05, clip=0.5, weight_decay=0.01, eps=1e-5)},
}
"""Runs on 2 ranks that do something else than the reference run."""

LAYOUTS = [(ranks, name) for ranks, trials in TRIALS.items() for name in trials]

NEAR = {"loss": 1e-6, "norm": 1e-6, "model": 1e-6, "average": 1e-6}
"""Losses and norms relative, weights absolute: float32 sums in another order."""


@dataclass(kw_only=True)
class Copies:
    """What a rank has after training two copies: hashes of its part by kind; whole averages."""

    bits: dict[str, str]
    averages: dict[str, State]


@dataclass(kw_only=True)
class Found:
    """What one rank of one number of processes found out."""

    outcomes: dict[str, Outcome]
    begun: dict[str, Any]
    clips: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, Any] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    products: dict[str, Counter[str]] = field(default_factory=dict)
    variants: dict[str, Outcome] = field(default_factory=dict)
    copies: Copies | None = None
    reduced: Outcome | None = None
    half: Outcome | None = None


def everything(world: World) -> Found:
    found = Found(
        outcomes={
            name: run(Trial.of(micro, engine=fsdp2(**settings)), world)
            for name, (micro, settings) in TRIALS[world.size].items()
        },
        begun=begun(world),
    )
    if world.size < 4:
        found.clips = {name: clipped(world, clip) for name, clip in CLIPS.items()}
        found.teachers = teachers(world)
    if world.size == 1:
        found.counts = {every: block_calls(world, every) for every in (0, 1, 2)}
        found.products = {name: products(world, settings) for name, settings in KEPT.items()}
    else:
        found.copies = copies(world)
    if world.size == 2:
        found.variants = {
            name: run(Trial.of(4, **settings), world) for name, settings in VARIANTS.items()
        }
        found.reduced = run(Trial.of(4, engine=fsdp2(bf16_reduce=True)), world, steps=1)
        found.half = run(Trial.of(4, engine=fsdp2(recompute=1, precision=Precision.bf16)), world)
    return found


CLIPS = {"never": 0.0, "not reached": 1e6, "reached": 0.25}


def clipped(world: World, clip: float) -> dict[str, Any]:
    """Take one step from known gradients and hand out both, so that others can redo it."""
    optim = AdamW(lr=1e-2, clip=clip, betas=[0.0, 0.0], eps=1.0)
    trial = Trial.of(1, optim=optim)
    engine = trial.shard(world)
    before = whole(engine, "model")
    trial.backward(engine, 0, world)
    discarded = float(engine.discard())
    trial.backward(engine, 0, world)
    gradients = {
        network(engine).stored_name(name): _full(p.grad)
        for name, p in network(engine).named_parameters()
        if p.grad is not None
    }
    norm = engine.step(optim.lr).norm
    cleared = all(p.grad is None for p in network(engine).parameters())
    return {
        "before": before,
        "gradients": gradients,
        "norm": float(norm),
        "discarded": discarded,
        "plain tensor": not isinstance(norm, DTensor),
        "cleared": cleared,
        "after": whole(engine, "model"),
    }


def teachers(world: World) -> dict[str, Any]:
    """Train with the student as its own teacher, and with a frozen one."""
    own = Trial.of(1, objective=objective(teacher_decay=0.0))
    engine = own.shard(world)
    loss = own.learn(engine, 0, world)[0]
    kinds = {span.kind for span in engine.spans()}
    found: dict[str, Any] = {
        "self": engine.teacher is engine.student,
        "self average": dict(engine.averages),
        "self kinds": kinds,
        "self names": set(engine.networks()),
        "self loss": loss,
    }
    kept = Trial.of(1, objective=objective(teacher_decay=1.0))
    engine = kept.shard(world)
    start = whole(engine, "frozen")
    for step in range(2):
        kept.learn(engine, step, world)
    return found | {
        "kept moved": apart(whole(engine, "frozen"), start),
        "student moved": apart(whole(engine, "model"), start),
        "kept average": dict(engine.averages),
        "kept names": set(engine.networks()),
        "kept is student": engine.teacher is engine.student,
    }


def begun(world: World) -> dict[str, Any]:
    """Look at an engine before its first step."""
    engine = Trial.of(1).shard(world)
    return {
        "model": whole(engine, "model"),
        "average": whole(engine, "average"),
        "shapes": engine.shapes(),
        "held": sum(span.local.numel() for span in engine.spans() if span.kind == "model"),
        "spans": [
            (span.kind, span.name, span.shape, span.offset, span.local.numel())
            for span in engine.spans()
        ],
        "moments": sum(
            int(span.local.count_nonzero())
            for span in engine.spans()
            if span.kind not in ("model", "average")
        ),
        "frozen": {
            network(engine).stored_name(name)
            for name, p in network(engine).named_parameters()
            if not p.requires_grad
        },
    }


def block_calls(world: World, every: int) -> int:
    """Count forwards of the student's blocks in one training pass, those anew included."""
    trial = Trial.of(8, engine=fsdp2(recompute=every))
    engine = trial.shard(world)
    calls = []
    for block in network(engine).blocks:
        attention = block.get_submodule("attn")
        attention.register_forward_hook(lambda *_: calls.append(1))
    trial.backward(engine, 0, world)
    return len(calls)


KEPT: dict[str, dict[str, Any]] = {
    "all": {"recompute": 0},
    "products": {"recompute": 1, "keep_products": True},
    "nothing": {"recompute": 1},
}
"""What blocks keep for the backward pass."""


class Operations(TorchDispatchMode):
    """Counts the operations that are run while it is entered, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def products(world: World, settings: dict[str, Any]) -> Counter[str]:
    """Count the operations of one forward and backward pass."""
    trial = Trial.of(8, engine=fsdp2(**settings))
    engine = trial.shard(world)
    with Operations() as operations:
        trial.backward(engine, 0, world)
    return operations.counts


def copies(world: World) -> Copies:
    """Train two copies of the state, averaged in bfloat16, for 3 steps."""
    engine = fsdp2(shard_over=world.size // 2)
    trial = Trial.of(2, engine=engine, average=Averages(slow=SLOW, bf16=True))
    sharded = trial.shard(world)
    for step in range(3):
        trial.learn(sharded, step, world)
    bits: dict[str, Any] = {span.kind: hashlib.sha256() for span in sharded.spans()}
    for span in sharded.spans():
        bits[span.kind].update(span.local.detach().view(torch.uint8).numpy().tobytes())
    return Copies(
        bits={kind: digest.hexdigest() for kind, digest in bits.items()},
        averages={kind: whole(sharded, kind) for kind in ("average", "slow")},
    )


def _full(gradient: Tensor) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor().clone()


@cache
def results(ranks: int) -> list[Found]:
    with pytest.MonkeyPatch.context() as env:
        if ranks > 1:  # one process has checked the shapes; checks are half of the time
            env.setenv("TWINFLOW_TYPE_HOOK", "0")
        found: list[Found] = spawn(everything, ranks, timeout_seconds=500)
    return found


@cache
def plain() -> Outcome:
    return run_plainly(Trial.of(8))


def near(one: Outcome, other: Outcome) -> dict[str, float]:
    """Return what is further apart than it may be."""
    return {key: far for key, far in one.worst(other).items() if far > NEAR[key]}


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_every_layout_gives_the_results_of_one_plain_process(ranks: int, layout: str) -> None:
    outcome = results(ranks)[0].outcomes[layout]
    assert near(outcome, plain()) == {}


@pytest.mark.parametrize("ranks", list(TRIALS))
def test_layouts_agree_with_one_another(ranks: int) -> None:
    one = results(1)[0].outcomes["whole"]
    for outcome in results(ranks)[0].outcomes.values():
        assert near(outcome, one) == {}


def test_the_run_that_is_compared_learns_and_clips() -> None:
    norms, losses = plain().norms, plain().losses
    assert len(losses) == 6
    assert max(norms) > OPTIM.clip, "no step is clipped: the comparison would not see it"
    started = results(1)[0].begun["model"]
    assert apart(plain().model, started) > 1e-3
    assert apart(plain().model, plain().average) > 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_sees_the_global_loss_and_norm(ranks: int) -> None:
    first, *others = (found.outcomes for found in results(ranks))
    for other in others:
        for key, outcome in other.items():
            assert outcome.losses == first[key].losses
            assert outcome.norms == first[key].norms


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("clip", list(CLIPS))
def test_clipping_uses_the_true_global_norm(ranks: int, clip: str) -> None:
    found = results(ranks)[0].clips[clip]
    parameters: dict[str, nn.Parameter] = {}
    for name, gradient in found["gradients"].items():
        parameters[name] = nn.Parameter(found["before"][name].clone())
        parameters[name].grad = gradient
    limit = CLIPS[clip]
    norm = nn.utils.clip_grad_norm_(parameters.values(), limit or float("inf"))
    assert found["norm"] == pytest.approx(float(norm), rel=1e-6)
    assert found["discarded"] == found["norm"], "what was discarded must leave nothing behind"
    assert float(norm) > 0.3  # so that .25 is reached
    torch.optim.AdamW(
        parameters.values(), lr=1e-2, betas=(0.0, 0.0), eps=1.0, weight_decay=0
    ).step()
    after = {name: found["after"][name] for name in parameters}
    assert apart(after, {n: p.detach() for n, p in parameters.items()}) < 1e-7
    assert found["plain tensor"]
    assert found["cleared"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_teacher_of_decay_0_is_the_student(ranks: int) -> None:
    for found in results(ranks):
        assert found.teachers["self"]
        assert found.teachers["self average"] == {}
        assert found.teachers["self names"] == {"raw"}
        assert found.teachers["self kinds"] == {"model", "exp_avg", "exp_avg_sq"}
        assert found.teachers["self loss"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_teacher_of_decay_1_stays_as_it_was(ranks: int) -> None:
    main = results(ranks)[0].teachers
    assert main["kept moved"] == 0
    assert main["student moved"] > 1e-3
    assert main["kept average"] == {}
    assert main["kept names"] == {"raw"}
    assert not main["kept is student"]


@pytest.mark.parametrize("ranks", list(TRIALS))
def test_a_start_is_the_given_weights_twice(ranks: int) -> None:
    begun, net, values = results(ranks)[0].begun, SIZE.build(), weights()
    want: State = {
        net.stored_name(name): values.read(net.stored_name(name), p.shape, 0, len(p))
        for name, p in net.named_parameters()
    }
    assert apart(begun["model"], want) == 0
    assert apart(begun["average"], want) == 0
    assert begun["shapes"] == {name: tuple(tensor.shape) for name, tensor in want.items()}
    for found in results(ranks):
        assert found.begun["moments"] == 0


@pytest.mark.parametrize("ranks", list(TRIALS))
def test_the_ranks_spans_cover_every_number_once(ranks: int) -> None:
    pieces: dict[tuple[str, str], list[tuple[int, int]]] = {}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for found in results(ranks):
        for kind, name, shape, offset, length in found.begun["spans"]:
            pieces.setdefault((kind, name), []).append((offset, length))
            shapes[kind, name] = shape
    for key, parts in pieces.items():
        end = 0
        for offset, length in sorted(parts):
            assert offset == end or not length, key
            end = max(end, offset + length)
        assert end == torch.Size(shapes[key]).numel(), key
    named = set(results(ranks)[0].begun["shapes"])
    trained = named - results(ranks)[0].begun["frozen"]
    for kind, names in {"model": named, "average": named, "exp_avg": trained}.items():
        assert {name for k, name in pieces if k == kind} == names


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_holds_much_more_than_its_part(ranks: int) -> None:
    total = results(1)[0].begun["held"]
    held = [found.begun["held"] for found in results(ranks)]
    assert sum(held) == total
    assert max(held) < 1.4 * total / ranks


def test_the_blocks_are_recomputed_that_should_be() -> None:
    plain_calls, every_call, second = (results(1)[0].counts[every] for every in (0, 1, 2))
    assert every_call - plain_calls == SIZE.layers
    assert second - plain_calls == SIZE.layers // 2


def test_bfloat16_stays_within_its_tolerance_of_float32() -> None:
    half = results(2)[0].half
    assert half is not None
    assert {tensor.dtype for tensor in (half.model | half.average).values()} == {torch.float32}
    far = half.worst(plain())
    assert far["loss"] < 0.03
    assert far["norm"] < 0.1
    assert far["model"] < 4 * OPTIM.lr
    # It is not float32 under another name.
    assert far["loss"] > 1e-5


def test_products_that_are_kept_are_not_run_again() -> None:
    everything, kept, nothing = (results(1)[0].products[name] for name in KEPT)

    def heavy(counts: Counter[str]) -> dict[str, int]:
        named = re.compile(r".*mm|.*matmul|.*linear|.*scaled_dot_product.*")
        return {name: count for name, count in counts.items() if named.fullmatch(name)}

    assert heavy(kept) == heavy(everything)
    assert sum(heavy(nothing).values()) > sum(heavy(everything).values())
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert nothing[attention] - everything[attention] == SIZE.layers
    # The rest of each block is run again.
    assert kept["gelu"] == nothing["gelu"] > everything["gelu"]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_gives_the_results_of_one_plain_process(name: str) -> None:
    expected, outcome = run_plainly(Trial.of(8, **VARIANTS[name])), results(2)[0].variants[name]
    assert near(outcome, expected) == {}
    assert max(expected.norms) > 0.5, "no step is clipped: the comparison would not see it"
    assert apart(expected.model, results(1)[0].begun["model"]) > 1e-3


def test_a_slow_average_has_a_decay_of_its_own() -> None:
    outcome = results(2)[0].variants["two averages in host memory"]
    assert apart(outcome.slow, outcome.average) > 1e-4
    assert apart(outcome.average, results(2)[0].outcomes["gathered"].average) < 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_copies_stay_alike_bit_for_bit_with_averages_rounded_at_random(ranks: int) -> None:
    bits = [each.copies.bits for each in results(ranks) if each.copies is not None]
    assert set(bits[0]) == {"model", "average", "slow", "exp_avg", "exp_avg_sq"}
    assert bits[: ranks // 2] == bits[ranks // 2 :]


@pytest.mark.parametrize("ranks", [2, 4])
def test_averages_in_bfloat16_stay_near_those_in_float32(ranks: int) -> None:
    found = results(ranks)[0].copies
    expected = run_plainly(Trial.of(8, average=Averages(slow=SLOW)), steps=3)
    assert found is not None
    for kind, state in {"average": expected.average, "slow": expected.slow}.items():
        assert {tensor.dtype for tensor in found.averages[kind].values()} == {torch.bfloat16}
        # Weights are near 1, and bfloat16 is rounded in steps of 1/128 there, up or down.
        assert apart(found.averages[kind], state) < 2 / 128


def test_gradients_are_reduced_in_bfloat16_only_if_asked_for() -> None:
    reduced, usual = results(2)[0].reduced, results(2)[0].outcomes["gathered"]
    assert reduced is not None
    assert reduced.losses[0] == usual.losses[0]
    assert reduced.norms[0] != pytest.approx(usual.norms[0], rel=1e-5)
    assert reduced.norms[0] == pytest.approx(usual.norms[0], rel=1e-2)


def test_a_negative_recompute_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"engine.recompute is -1; it must be 0 or more"):
        FSDP2(recompute=-1)
