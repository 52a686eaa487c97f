"""The largest network on one GPU: each block is updated in the backward pass that reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import NO_LIMITS, Engine, Networks, Parts, Span, Taken
from twinflow_train.engines.compiling import compile_blocks, refuse_unknown_backend
from twinflow_train.engines.optim import Optim, RAdam
from twinflow_train.engines.pieces import Now, Trained, advance, now_of, rule_of
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.engines.rounding import keys
from twinflow_train.errors import UserError
from twinflow_train.models.adapter import Adapter, Assembly
from twinflow_train.models.base import Model
from twinflow_train.models.weights import Weights


@dataclass(kw_only=True)
class Single(Engine):
    """One GPU, no shards: weights in the type that computes, and never the whole gradient.

    As soon as the backward pass has a block's gradient, the block is clipped, updated and its
    gradient freed. With engine.precision=bf16 and optim=adamw8bit a number takes 4 bytes: its
    weight, rounded at random with the mean kept, and two codes. In exchange:

    - no accumulation: the batch is one micro-batch of one rank.
    - no average and no second network: the student is its own teacher.
    - no float32 masters, unless engine.precision=fp32 makes the weights so.
    - clipping by block: of the N blocks, with what is in none as one more, none may pass
      optim.clip / sqrt(N), so that the whole gradient is at most optim.clip long.
    - no skipping: when the gradient's norm is known, all but the last block is updated.
      A loss that is not finite still updates nothing. Where only some blocks' gradients are not
      finite, those blocks keep weights and moments; the others are updated, and the step counts as
      skipped.

    fused: on GPUs, compile the update into one kernel.
    compile: backend of torch.compile for the blocks, such as inductor; null is none.
    """

    fused: bool = True
    compile: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown_backend(self.compile)

    def check(self, run: Parts, *, ranks: int) -> None:
        """Refuse what cannot go with it (see `Engine`)."""
        decay = run.objective.teacher_decay
        for wrong, why in (
            (ranks > 1, f"is for one GPU, and this job has {ranks}: use engine=fsdp2"),
            (
                run.micro_batch < run.batch,
                f"does not accumulate gradients: set micro_batch={run.batch}, the batch, or a "
                f"batch of {run.micro_batch}",
            ),
            (
                run.adapter.partial,
                "trains all weights: use adapter=none, or engine=fsdp2, with which adapter=lora "
                "fits one GPU",
            ),
            (
                decay > 0,
                f"holds one network, and objective.teacher_decay = {decay} wants a second one: "
                "set objective.teacher_decay=0",
            ),
            (run.average.slow > 0, "holds one network: set average.slow=0"),
            (isinstance(run.optim, RAdam), "works with optim=adamw8bit and optim=adamw"),
            (
                run.faults.skip_above > 0,
                "cannot skip a step for its loss or norm, which it knows too late: set "
                "faults.skip_above=0",
            ),
        ):
            if wrong:
                raise UserError(f"engine=single {why}")

    def shard(
        self,
        model: Model,
        weights: Weights,
        *,
        adapter: Adapter,
        optim: Optim,
        decay: float,
        average: Averages,
        world: World,
    ) -> ShardedSingle:
        """Build and fill the network (see `Engine`)."""
        assert world.size == 1, "see `check`"
        assert decay == average.slow == 0, "see `check`"
        (assembly,) = adapter.assemble(model, [])
        self.fill(assembly, weights, world.device)
        return ShardedSingle(assembly, optim=optim, world=world, fused=self.fused)

    def fill(self, assembly: Assembly, weights: Weights, device: torch.device) -> None:
        """Fill a network that is on meta; host memory holds a tensor of it at a time."""
        net = assembly.net
        for parameter in net.parameters():
            parameter.data = parameter.data.to(self.precision.dtype)
        if self.recompute:
            net.recompute(
                recompute_every(self.recompute, len(net.blocks), keep_products=self.keep_products)
            )
        if self.compile:
            compile_blocks(net.blocks, backend=self.compile)
        net.to_empty(device=device)
        with torch.no_grad():
            for _, name, parameter in assembly.tensors():
                parameter.copy_(weights.read(name, parameter.shape, 0, parameter.shape[0]))

    def held(self, kind: str, average: Averages) -> torch.dtype:
        """Return the type in which parameters are held: that of computing."""
        return self.precision.dtype


class Unit:
    """Parameters that are clipped, updated and freed together: of a block, or of none."""

    def __init__(self, members: Sequence[tuple[int, Trained]]) -> None:
        self.members = members
        self.missing = 0


class ShardedSingle(Networks):
    """A network that is updated in its own backward pass (see `Sharded`)."""

    def __init__(self, assembly: Assembly, *, optim: Optim, world: World, fused: bool) -> None:
        super().__init__(assembly.networks, {})
        self._optim, self._world, self.frozen = optim, world, 0
        self._weights = {name: parameter for _, name, parameter in assembly.tensors()}
        self._trained = [
            Trained(p, name, optim) for name, p in self._weights.items() if p.requires_grad
        ]
        self._units = list(units(assembly, self._trained))
        for number, unit in enumerate(self._units):
            for _, one in unit.members:
                one.parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))
        self._rule = rule_of(optim, world.device)
        self._update = _update(fused and world.device.type == "cuda")
        self._norms = torch.zeros(len(self._units), device=world.device)
        self._updates = torch.zeros((), dtype=torch.int64, device=world.device)
        self._finite = torch.ones((), dtype=torch.bool, device=world.device)
        self._keys = keys(self._updates, len(self._trained))
        self._now: Now | None = None

    @property
    def updates(self) -> int:
        """Optimizer steps taken; reading it waits for the device."""
        return int(self._updates)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each parameter, by its name in weight files."""
        return {name: tuple(p.shape) for name, p in self._weights.items()}

    def begin(self, rate: float) -> None:
        """Let the next backward pass update, at this learning rate."""
        count = self._updates + 1
        self._now = now_of(self._optim, rate, count)
        # Of what is counted in checkpoints, so that a resumed run rounds alike.
        self._keys = keys(count, len(self._trained))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Differentiate the loss, and update each block on the way if a step has begun."""
        assert last, "a second backward pass would update twice: see `Single.check`"
        self._finite = loss.detach().isfinite().to(self._norms.device)
        for unit in self._units:
            unit.missing = len(unit.members)
        loss.backward()
        missing = [one.name for unit in self._units if unit.missing for _, one in unit.members]
        assert not missing, f"no gradient: {missing}; see models.freeze_unused"

    def step(
        self,
        rate: float,
        *,
        number: int = 0,
        loss: Tensor | None = None,
        limits: tuple[float, float] = NO_LIMITS,
    ) -> Taken:
        """End a step that the backward pass has taken.

        It counts unless the loss, or the gradient of a block, was not finite (see `Single`).
        """
        assert self._now is not None, "a step begins with `begin`"
        self._now = None
        norm = torch.linalg.vector_norm(self._norms)
        updated = self._finite & norm.isfinite()
        self._updates += updated
        return Taken(norm=norm, updated=updated)

    def discard(self) -> Tensor:
        """Return the norm of the gradient, which is freed already."""
        norm: Tensor = torch.linalg.vector_norm(self._norms)
        return norm

    def spans(self) -> Iterator[Span]:
        """Yield every part of the state as flat views."""
        for name, p in self._weights.items():
            yield Span(
                kind="model", name=name, shape=tuple(p.shape), offset=0, local=p.detach().view(-1)
            )
        for one in self._trained:
            for saved in one.saved():
                shape = one.shape if saved.block == 1 else (saved.local.numel(),)
                yield Span(kind=saved.kind, name=one.name, shape=shape, offset=0, local=saved.local)

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        self._updates.fill_(updates)

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of the weights."""
        assert kind == "model", "there is one network"
        for name, parameter in self._weights.items():
            yield name, parameter.detach().cpu()

    @torch.no_grad()
    def _arrived(self, number: int, _: Tensor) -> None:
        """Take note of one more gradient of a unit; with the last one update and free them all."""
        unit = self._units[number]
        unit.missing -= 1
        if unit.missing:
            return
        gradients = [_some(one.parameter.grad) for _, one in unit.members]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = self._norms[number].copy_(torch.linalg.vector_norm(torch.stack(norms)))
        del gradients
        now = None if self._now is None else self._clipped(self._now, norm)
        for place, one in unit.members:
            gradient, one.parameter.grad = _some(one.parameter.grad), None
            if now is not None:
                one.step(gradient, self._update, now=now, rule=self._rule, key=self._keys[place])

    def _clipped(self, now: Now, norm: Tensor) -> Now:
        """Say how a unit of this gradient norm is updated."""
        fine = self._finite & norm.isfinite()
        share = torch.ones_like(norm)
        if self._optim.clip:
            most = self._optim.clip / math.sqrt(len(self._units))
            share = (most / (norm + 1e-6)).clamp(max=1.0)
        return now._replace(share=share, fine=fine)


def units(assembly: Assembly, trained: Sequence[Trained]) -> Iterator[Unit]:
    """Divide what is trained: each block, and what is in none."""
    places = {id(one.parameter): (place, one) for place, one in enumerate(trained)}
    for part in (*assembly.net.blocks, assembly.net):
        found = [places.pop(id(p)) for p in part.parameters() if id(p) in places]
        if found:
            yield Unit(found)


def _update(fused: bool) -> Callable[..., Any]:
    """Return what updates a piece; compiled, it reads and writes each number once."""
    return torch.compile(advance) if fused else advance


def _some(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "it has just arrived"
    return gradient
