"""A tiny Qwen-Image TwinFlow run on a real engine, a step at a time."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from twinflow_train.batch import Batch, Condition
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine, Precision, Sharded
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW, Optim, RAdam
from twinflow_train.models.adapter import Adapter, NoAdapter
from twinflow_train.models.base import VelocityNet
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.weights import RandomWeights
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.rng import generator

# Sizes that neither 2 nor 4 divides: some ranks hold fewer rows than others, or none.
SIZE = QwenImage(layers=2, heads=3, head_dim=6, text_width=7, channels=3, rope=[2, 2, 2])
LATENT = (3, 4, 6)
BATCH = 8
SEED = 5
STEPS = 6
# Adam divides a gradient by its own size: with eps at 1e-8, rounding in gradients that are nearly
# zero would decide the sign of whole steps.
OPTIM = AdamW(lr=2e-3, warmup=2, constant=0.5, clip=0.5, weight_decay=0.01, eps=1e-5)

State = dict[str, Tensor]


def fsdp2(**changes: Any) -> FSDP2:
    """Give FSDP2 in float32 without recomputation."""
    settings: dict[str, Any] = {"precision": Precision.fp32, "recompute": 0}
    return FSDP2(**(settings | changes))


def objective(**changes: Any) -> TwinFlow:
    """Give the reference shares and order, with guidance .5 and an average of decay .99."""
    return TwinFlow(**({"guidance": 0.5} | changes))


def weights(seed: int = 0) -> RandomWeights:
    """Draw weights of which none is zero, so that every part works from the first step on."""
    return RandomWeights(seed, _rule, QwenImage.second.aliases())


def _rule(name: str, shape: torch.Size) -> tuple[str, float]:
    if len(shape) == 1 and name.endswith("weight"):
        return "constant", 1.0
    return "normal", 0.3 / math.sqrt(shape[-1] / 8)


def batch_of(rows: Sequence[int], step: int) -> Batch:
    """Make some samples of a step's global batch; texts are 1 to 4 tokens long."""

    def draw(index: int, kind: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator("test", kind, step, index))

    captions = [draw(i, "text", 1 + (i + step) % 4, SIZE.text_width) for i in rows]
    return Batch(
        data=torch.stack([draw(i, "data", *LATENT) for i in rows]),
        cond=Condition.pad(captions),
        null=Condition(tokens=torch.full((1, 2, SIZE.text_width), 0.1)),
        keys=tuple(map(str, rows)),
    )


@dataclass(kw_only=True)
class Trial:
    """One way to run: layout, precision, objective and optimizer."""

    micro_batch: int = BATCH
    engine: Engine
    objective: TwinFlow
    optim: Optim
    average: Averages
    adapter: Adapter

    @staticmethod
    def of(micro_batch: int, **settings: Any) -> Trial:
        """Give the reference run with some settings changed."""
        usual: dict[str, Any] = {
            "engine": fsdp2(),
            "objective": objective(),
            "optim": OPTIM,
            "average": Averages(),
            "adapter": NoAdapter(),
        }
        return Trial(**(usual | settings), micro_batch=micro_batch)

    def shard(self, world: World, *, seed: int = 0, size: QwenImage = SIZE) -> Sharded:
        """Build the engine from weights of `seed`."""
        return self.engine.shard(
            size,
            self.adapter.weights(weights(seed), seed=seed),
            adapter=self.adapter,
            optim=self.optim,
            decay=self.objective.teacher_decay,
            average=self.average,
            world=world,
        )

    def backward(self, engine: Sharded, step: int, world: World) -> float:
        """Run the forward and backward passes of one step; return the global loss."""
        deal = Deal(batch=BATCH, micro_batch=self.micro_batch, ranks=world.size, rank=world.rank)
        total = torch.zeros(())
        for micro, rows in enumerate(deal.rows()):
            draws = self.objective.draw(deal, micro, seed=SEED, step=step, latent=LATENT)
            loss = self.objective.loss(engine.student, engine.teacher, batch_of(rows, step), draws)
            engine.backward(loss.total, last=micro == deal.micro_steps - 1)
            total += loss.total.detach()
        return float(world.sum(total))

    def learn(self, engine: Sharded, step: int, world: World) -> tuple[float, float]:
        """Take one step; return the global loss and the gradient norm."""
        rate = self.optim.rate(step, STEPS)
        engine.begin(rate)
        loss = self.backward(engine, step, world)
        return loss, float(engine.step(rate).norm)


@dataclass(kw_only=True)
class Outcome:
    """What a run comes to: losses and norms by step; weights and their averages at the end."""

    losses: list[float]
    norms: list[float]
    model: State
    average: State
    slow: State = field(default_factory=dict)

    def worst(self, other: Outcome) -> dict[str, float]:
        """Measure the distance: losses and norms relative, weights absolute (they are near 1)."""
        return {
            "loss": _relative(self.losses, other.losses),
            "norm": _relative(self.norms, other.norms),
            "model": apart(self.model, other.model),
            "average": max(apart(self.average, other.average), apart(self.slow, other.slow)),
        }


def run(trial: Trial, world: World, *, steps: int = STEPS) -> Outcome:
    """Run some steps from the start; weights are gathered on rank 0 only."""
    engine = trial.shard(world)
    pairs = [trial.learn(engine, step, world) for step in range(steps)]
    average = whole(engine, "average") if trial.objective.teacher_decay else {}
    return Outcome(
        losses=[loss for loss, _ in pairs],
        norms=[norm for _, norm in pairs],
        model=whole(engine, "model"),
        average=average,
        slow=whole(engine, "slow") if trial.average.slow else {},
    )


def run_plainly(trial: Trial, *, steps: int = STEPS) -> Outcome:
    """Do the same without an engine: one process, whole tensors, textbook updates."""
    student = SIZE.build().to_empty(device="cpu")
    values = weights()
    with torch.no_grad():
        for name, p in student.named_parameters():
            p.copy_(values.read(student.stored_name(name), p.shape, 0, len(p)))
    teacher, slow = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    trained = [p for p in student.parameters() if p.requires_grad]
    optim, optimizer = trial.optim, _plain(trial.optim, trained)
    deal = Deal(batch=BATCH, micro_batch=BATCH, ranks=1, rank=0)
    losses, norms = [], []
    targets, decays = [trial.objective.teacher_decay, trial.average.slow], [0.0, 0.0]
    for step in range(steps):
        draws = trial.objective.draw(deal, 0, seed=SEED, step=step, latent=LATENT)
        loss = trial.objective.loss(student, teacher, batch_of(range(BATCH), step), draws).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = optim.rate(step, STEPS)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, optim.clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
        decays = [d + (1 - d) * (goal - d) / 2 for d, goal in zip(decays, targets, strict=True)]
        for net, decay in zip((teacher, slow), decays, strict=True):
            with torch.no_grad():
                for a, p in zip(net.parameters(), student.parameters(), strict=True):
                    a.copy_(decay * a + (1 - decay) * p)
    return Outcome(
        losses=losses,
        norms=norms,
        model=_state(student),
        average=_state(teacher),
        slow=_state(slow) if trial.average.slow else {},
    )


def _plain(optim: Optim, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the textbook's form of an optimizer: a tensor at a time."""
    usual: dict[str, Any] = {"betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps}
    usual |= {"weight_decay": optim.weight_decay, "foreach": False}
    if isinstance(optim, RAdam):
        return torch.optim.RAdam(trained, decoupled_weight_decay=True, **usual)
    return torch.optim.AdamW(trained, **usual)


def network(engine: Sharded) -> VelocityNet:
    """Give the student as the module that it is."""
    assert isinstance(engine.student, VelocityNet)
    return engine.student


def whole(engine: Sharded, kind: str) -> State:
    """Gather the whole weights or their average; empty but on rank 0."""
    return {name: tensor.clone() for name, tensor in engine.whole(kind)}


def fingerprint(engine: Sharded) -> str:
    """Hash every number of this rank's state."""
    found = hashlib.sha256()
    for span in engine.spans():
        found.update(f"{span.kind}/{span.name}/{span.shape}/{span.offset}".encode())
        found.update(span.local.detach().numpy().tobytes())
    return found.hexdigest()


def apart(one: State, other: State) -> float:
    """Return the largest difference between two states of the same names."""
    assert one.keys() == other.keys()
    return max((float((one[n] - other[n]).abs().max()) for n in one), default=0.0)


def _state(net: VelocityNet) -> State:
    return {net.stored_name(name): p.detach().clone() for name, p in net.named_parameters()}


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
