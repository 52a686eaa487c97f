"""Sharding by torch's FSDP2: also the engine of a single process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from twinflow_train.batch import Velocity
from twinflow_train.dist import World
from twinflow_train.engines.average import decay_at, follow
from twinflow_train.engines.base import Engine, Precision, Span
from twinflow_train.engines.optim import MOMENTS, Optim, begin_state, set_updates
from twinflow_train.errors import UserError
from twinflow_train.models.base import Model, VelocityNet, Weights


@dataclass(kw_only=True)
class FSDP2(Engine):
    """Fully sharded data parallel: every rank holds 1 / ranks of weights, average and moments.

    precision: type in which the networks compute.
    recompute: recompute every n-th block's activations in the backward pass; 0 keeps all.
    reshard: free gathered weights after each forward pass; without it both networks stay gathered
        from their first pass to the end of the step: fewer gathers, more memory.
    """

    precision: Precision = Precision.bf16
    recompute: int = 1
    reshard: bool = True

    def __post_init__(self) -> None:
        if self.recompute < 0:
            raise ValueError(f"engine.recompute must be 0 or more, got {self.recompute}")

    def shard(
        self, model: Model, weights: Weights, *, optim: Optim, decay: float, world: World
    ) -> ShardedFSDP2:
        """Build, shard and fill student and teacher (see `Engine`)."""
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        policy = MixedPrecisionPolicy(
            param_dtype=self.precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

        def sharded() -> VelocityNet:
            net = model.build()
            if self.recompute:
                net.recompute(recompute_every(self.recompute, len(net.blocks)))
            for block in net.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
            # Without the explicit flag a root that only runs forward stays gathered.
            fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
            net.to_empty(device=world.device)
            fill(net, weights)
            return net

        student = sharded()
        second = sharded().requires_grad_(False) if decay > 0 else None
        return ShardedFSDP2(student, second, optim=optim, decay=decay, world=world)


class ShardedFSDP2:
    """A student and its teacher under FSDP2 (see `Sharded`)."""

    def __init__(
        self,
        student: VelocityNet,
        second: VelocityNet | None,
        *,
        optim: Optim,
        decay: float,
        world: World,
    ) -> None:
        self._net, self._second = student, second
        self._optim, self._decay, self._world = optim, decay, world
        # The sharded parameters, held here: while gathered, a module shows others in their place.
        self._shards = {"model": _sharded(student)}
        if second is not None:
            self._shards["average"] = _sharded(second)
        self._trained = [p for p in student.parameters() if p.requires_grad]
        self._optimizer = optim.build(self._trained)
        begin_state(self._optimizer)
        self.updates = 0
        self.student: Velocity = student
        self.teacher: Velocity = second if second is not None else student
        self.average: Velocity | None = second if 0 < decay < 1 else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each of the student's parameters, by its name in weight files."""
        return {name: tuple(p.shape) for name, p in self._shards["model"].items()}

    def networks(self) -> dict[str, Velocity]:
        """Name the networks to evaluate: "raw" and, where there is an average, "ema"."""
        raw = {"raw": self.student}
        return raw if self.average is None else raw | {"ema": self.average}

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the loss; reduces at once.

        FSDP2 averages over ranks, the loss is summed over them: hence the factor.
        """
        (loss * self._world.size).backward()

    def step(self, rate: float) -> Tensor:
        """Clip, update, average and clear; return the global gradient norm before clipping.

        Raises:
            UserError: it is not finite; alike on every rank, and nothing was updated.
        """
        norm = nn.utils.get_total_norm([_some(p.grad) for p in self._trained], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not norm.isfinite():
            raise UserError(
                f"the gradient norm is {float(norm)} after {self.updates} updates; nothing was "
                "updated and the newest checkpoint is whole: lower optim.lr, or look at the data"
            )
        if self._optim.clip:
            nn.utils.clip_grads_with_norm_(self._trained, self._optim.clip, norm, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self._second is not None and self._decay < 1:
            decay = decay_at(self._decay, self.updates)
            follow(self._locals("average"), self._locals("model"), decay)
            reshard(self._second)
        reshard(self._net)
        return norm

    def spans(self) -> Iterator[Span]:
        """Yield this rank's part of every parameter, average and moment as live flat views."""
        for kind, shards in self._shards.items():
            yield from (_span(kind, name, shard.detach()) for name, shard in shards.items())
        names = {id(p): name for name, p in self._shards["model"].items()}
        for parameter, state in self._optimizer.state.items():
            for kind in MOMENTS:
                yield _span(kind, names[id(parameter)], state[kind])

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        self.updates = updates
        set_updates(self._optimizer, updates)

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of "model" or "average" on rank 0; collective."""
        for name, parameter in self._shards[kind].items():
            tensor = parameter.full_tensor().detach()
            if self._world.main:
                yield name, tensor.cpu()

    def _locals(self, kind: str) -> list[Tensor]:
        return [_dtensor(shard.detach()).to_local() for shard in self._shards[kind].values()]


def recompute_every(n: int, blocks: int) -> Callable[..., object]:
    """Return a caller of blocks, asked in turn, that recomputes every n-th in the backward pass."""
    turns = count()

    def call(block: Callable[..., object], *inputs: Any) -> object:
        if next(turns) % blocks % n:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    return call


def reshard(net: nn.Module) -> None:
    """Free what is still gathered: it is out of date once the shards have changed."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(net: VelocityNet, weights: Weights) -> None:
    """Load each parameter's own rows from `weights`; no rank holds more than one whole tensor."""
    for name, shard in _sharded(net).items():
        local = shard.to_local()
        start = _first_row(shard)
        rows = weights.read(name, shard.shape, start, start + len(local))
        with torch.no_grad():
            local.copy_(rows)


def _span(kind: str, name: str, tensor: Tensor) -> Span:
    shard = _dtensor(tensor)
    local = shard.to_local()
    row = math.prod(shard.shape[1:])
    return Span(
        kind=kind,
        name=name,
        shape=tuple(shard.shape),
        offset=_first_row(shard) * row,
        local=local.view(-1),
    )


def _first_row(shard: DTensor) -> int:
    """Return where this rank's rows begin: FSDP2 cuts the first axis into equal chunks."""
    mesh = shard.device_mesh
    chunk = -(-shard.shape[0] // mesh.size())
    return min(chunk * mesh.get_local_rank(), shard.shape[0])


def _sharded(net: VelocityNet) -> dict[str, DTensor]:
    """Name a network's sharded parameters as weight files do."""
    return {net.stored_name(name): _dtensor(p) for name, p in net.named_parameters()}


def _dtensor(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor), "FSDP2 parameters and their moments are DTensors"
    return tensor


def _some(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a trained parameter got no gradient: see models.freeze_unused"
    return gradient
