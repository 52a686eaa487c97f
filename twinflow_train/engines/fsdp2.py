"""Sharding by torch's FSDP2: also the engine of a single process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from twinflow_train.dist import World
from twinflow_train.engines.average import Averages, Ramp, follow
from twinflow_train.engines.base import NO_LIMITS, Engine, Networks, Span, Taken, allowed
from twinflow_train.engines.compiling import compile_blocks, refuse_unknown_backend
from twinflow_train.engines.fp8 import to_fp8
from twinflow_train.engines.optim import MOMENTS, Optim, Saved, set_rate, set_updates
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.errors import UserError, check
from twinflow_train.models.adapter import BASE, Adapter, Assembly
from twinflow_train.models.base import Model
from twinflow_train.models.weights import Weights


@dataclass(kw_only=True)
class FSDP2(Engine):
    """Fully sharded data parallel: weights, averages and moments are cut over `shard_over` ranks.

    shard_over: ranks that share one copy of the state; 0 is all. With fewer than all, copies are
    replicated (HSDP): gathers stay among these ranks, for instance those of one node, and only
    gradients cross between copies, once a step.
    reshard: free gathered weights after each forward pass; without it the networks stay gathered
        from their first pass to the end of the step: fewer gathers, more memory.
    keep_teacher: free them, but for the teacher's, which stay gathered from its first pass of a
        step to the last: its passes follow one another. Not with adapter=lora: there it is the
        student, with other adapters.
    offload: keep shards and moments in host memory, and let the CPU take the optimizer's step.
    bf16_reduce: reduce gradients in bfloat16: half the traffic, a little noise.
    prefetch: blocks whose weights are gathered while the one before them computes.
    compile: backend of torch.compile for the blocks, such as inductor; null is none.
    fp8: multiply in the blocks' linear layers in 8 bits (torchao; GPUs from Hopper on).
    """

    shard_over: int = 0
    reshard: bool = True
    keep_teacher: bool = False
    offload: bool = False
    bf16_reduce: bool = False
    prefetch: int = 1
    compile: str | None = None
    fp8: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = [
            ("shard_over", self.shard_over >= 0, "0 (all ranks) or more"),
            ("prefetch", self.prefetch >= 0, "0 or more"),
        ]
        check("engine", self, rules)
        if self.compile and self.keep_products:
            raise UserError(
                "engine.keep_products does not see what a compiler makes of products: set it to "
                "false, or engine.compile to null"
            )
        refuse_unknown_backend(self.compile)

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
    ) -> ShardedFSDP2:
        """Build, shard and fill the networks (see `Engine`)."""
        mesh, decays = self._mesh(world), average.decays(decay)
        assemblies = adapter.assemble(model, list(decays))
        for one in assemblies:
            self._shard(one, mesh, average)
            fill(one, weights)
        return ShardedFSDP2(assemblies, decays=decays, optim=optim, mesh=mesh, world=world)

    def frees(self, assembly: Assembly) -> bool:
        """Tell whether a module's gathered weights are freed after each of its passes."""
        teaches = not assembly.trained and bool({"average", "frozen"} & assembly.networks.keys())
        return self.reshard and not (self.keep_teacher and teaches)

    def _mesh(self, world: World) -> DeviceMesh:
        """Arrange the ranks: neighbours share one copy of the state."""
        over = self.shard_over or world.size
        if world.size % over:
            raise UserError(
                f"engine.shard_over = {over} does not divide the {world.size} ranks of this job"
            )
        device = world.device.type
        if over == world.size:
            return init_device_mesh(device, (over,), mesh_dim_names=("shard",))
        copies = world.size // over
        return init_device_mesh(device, (copies, over), mesh_dim_names=("replicate", "shard"))

    def _shard(self, assembly: Assembly, mesh: DeviceMesh, average: Averages) -> None:
        """Cut one module over the ranks, and take the memory for this rank's part of it."""
        net, offload = assembly.net, self.offload if assembly.trained else average.offload
        for kind, _, parameter in assembly.tensors():
            parameter.data = parameter.data.to(self.held(kind, average))
        if self.recompute:
            call = recompute_every(
                self.recompute, len(net.blocks), keep_products=self.keep_products
            )
            net.recompute(call)
        if self.fp8:
            to_fp8(net.blocks, emulate=mesh.device_type != "cuda")
        if self.compile:
            compile_blocks(net.blocks, backend=self.compile)
        policy = MixedPrecisionPolicy(
            param_dtype=self.precision.dtype,
            reduce_dtype=torch.bfloat16 if self.bf16_reduce else torch.float32,
            cast_forward_inputs=False,
        )
        place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else None
        for module in (*net.blocks, net):
            # Without the explicit flag a root that only runs forward stays gathered.
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=self.frees(assembly),
                offload_policy=place or OffloadPolicy(),
            )
        for i, block in enumerate(net.blocks):
            following = net.blocks[i + 1 : i + 1 + self.prefetch]
            _fsdp(block).set_modules_to_forward_prefetch([*map(_fsdp, following)])
        net.to_empty(device="cpu" if offload else mesh.device_type)


class ShardedFSDP2(Networks):
    """A student and the networks that follow it under FSDP2 (see `Sharded`)."""

    def __init__(
        self,
        assemblies: Sequence[Assembly],
        *,
        decays: Mapping[str, float],
        optim: Optim,
        mesh: DeviceMesh,
        world: World,
    ) -> None:
        found = {kind: each for one in assemblies for kind, each in one.networks.items()}
        super().__init__(found, decays)
        self._optim, self._mesh, self._world = optim, mesh, world
        # The sharded parameters, held here: while gathered, a module shows others in their place.
        self._shards: dict[str, dict[str, DTensor]] = {}
        self.frozen = 0
        for kind, name, parameter in (each for one in assemblies for each in one.tensors()):
            if kind == BASE:
                self.frozen += parameter.numel()
            else:
                self._shards.setdefault(kind, {})[name] = _dtensor(parameter)
        moving = {"model", *self.averages}
        self._moving = [one.net for one in assemblies if moving & one.networks.keys()]
        self._trained = [p for one in assemblies for p in one.net.parameters() if p.requires_grad]
        self._optimizer: Any = optim.build(self._trained)
        device = self._trained[0].device
        self._ramps = {kind: Ramp(decays[kind], device) for kind in self.averages}
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def updates(self) -> int:
        """Optimizer steps taken; reading it waits for the device."""
        return int(self._updates)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each of the student's own parameters, by its name in weight files."""
        return {name: tuple(p.shape) for name, p in self._shards["model"].items()}

    def begin(self, rate: float) -> None:
        """Free what evaluations have gathered; the rate is asked for when the step is taken."""
        for net in self._moving:
            reshard(net)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the loss; reduces at once.

        Only the sum over replicated copies waits for the last micro-step. FSDP2 averages over
        ranks, the loss is summed over them: hence the factor.
        """
        _fsdp(self._moving[0]).set_requires_all_reduce(last)
        (loss * self._world.size).backward()

    def step(
        self,
        rate: float,
        *,
        number: int = 0,
        loss: Tensor | None = None,
        limits: tuple[float, float] = NO_LIMITS,
    ) -> Taken:
        """Clip, update, average and clear (see `Sharded.step`).

        Whether the step is taken is decided on the device, and nothing waits for it; but for
        optimizers that have to be told before.
        """
        norm = self._norm()
        taken = Taken(norm=norm, updated=allowed(norm, loss, limits))
        if self._optim.skips:
            self._optimizer.found_inf = 1.0 - taken.updated.float()
        elif not bool(taken.updated):
            self._clear()
            return taken
        if self._optim.clip:
            nn.utils.clip_grads_with_norm_(self._trained, self._optim.clip, norm, foreach=True)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._updates += taken.updated
        for kind, ramp in self._ramps.items():
            # The same draws in every copy of a shard, or copies would drift apart.
            path = (kind, number, self._mesh.get_local_rank("shard"))
            now = ramp.advance(taken.updated)
            follow(self._locals(kind), self._locals("model"), now, path=path)
        self._clear()
        return taken

    def discard(self) -> Tensor:
        """Forget the accumulated gradient without an update; return its global norm."""
        norm = self._norm()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _clear(self) -> None:
        """Forget the gradient, and what is gathered: the next step may begin with other weights."""
        self._optimizer.zero_grad(set_to_none=True)
        for net in self._moving:
            reshard(net)

    def _norm(self) -> Tensor:
        norm = nn.utils.get_total_norm([_some(p.grad) for p in self._trained], foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def spans(self) -> Iterator[Span]:
        """Yield this rank's part of every parameter, average and moment as flat views."""
        for kind, shards in self._shards.items():
            for i, (name, shard) in enumerate(shards.items()):
                saved = Saved(kind=kind, local=_dtensor(shard.detach()).to_local().view(-1))
                yield _span(shard, saved, name, turn=i)
        names = {id(p): name for name, p in self._shards["model"].items()}
        for i, (parameter, state) in enumerate(self._optimizer.state.items()):
            for kind in MOMENTS:
                for saved in self._optim.saved(kind, _dtensor(state[kind])):
                    yield _span(_dtensor(parameter), saved, names[id(parameter)], turn=i)

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        self._updates.fill_(updates)
        for ramp in self._ramps.values():
            ramp.restore(updates)
        set_updates(self._optimizer, updates)
        self._clear()

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of a kind of weights on rank 0; collective."""
        for name, parameter in self._shards[kind].items():
            tensor = parameter.full_tensor().detach()
            if self._world.main:
                yield name, tensor.cpu()

    def _locals(self, kind: str) -> list[Tensor]:
        shards = self._shards[kind]
        return [_dtensor(shards[name].detach()).to_local() for name in self._shards["model"]]


def reshard(net: nn.Module) -> None:
    """Free what is still gathered: it is out of date once the shards have changed."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(assembly: Assembly, weights: Weights) -> None:
    """Load each parameter's own rows from `weights`; no rank holds more than one whole tensor."""
    for _, name, parameter in assembly.tensors():
        shard = _dtensor(parameter)
        local = shard.to_local()
        start = _first_row(shard)
        rows = weights.read(name, shard.shape, start, start + len(local))
        with torch.no_grad():
            local.copy_(rows)


def _span(shard: DTensor, saved: Saved, name: str, *, turn: int) -> Span:
    """Describe this rank's part; replicated copies take turns in saving, tensor by tensor."""
    mesh = shard.device_mesh
    copies = mesh.size() // mesh.size(-1)
    mine = turn % copies == (mesh.get_local_rank(0) if copies > 1 else 0)
    offset = _first_row(shard) * math.prod(shard.shape[1:])
    return Span(
        kind=saved.kind,
        name=name,
        shape=tuple(shard.shape) if saved.block == 1 else (shard.numel() // saved.block,),
        offset=offset // saved.block,
        local=saved.local,
        mine=mine,
    )


def _first_row(shard: DTensor) -> int:
    """Return where this rank's rows begin: FSDP2 cuts the first axis into equal chunks."""
    mesh = shard.device_mesh
    chunk = -(-shard.shape[0] // mesh.size(-1))
    return min(chunk * mesh.get_local_rank(mesh.ndim - 1), shard.shape[0])


def _fsdp(net: nn.Module) -> FSDPModule:
    assert isinstance(net, FSDPModule), "the network went through fully_shard"
    return net


def _dtensor(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor), "FSDP2 parameters and their moments are DTensors"
    return tensor


def _some(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a trained parameter got no gradient: see models.freeze_unused"
    return gradient
