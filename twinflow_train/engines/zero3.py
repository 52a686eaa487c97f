"""Sharding by DeepSpeed's ZeRO-3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinflow_train.batch import Velocity
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages, decay_at, follow
from twinflow_train.engines.base import Engine, Precision, Span, evaluated, not_finite
from twinflow_train.engines.optim import MOMENTS, AdamW8bit, Optim, set_rate, set_updates
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.engines.zero3_setup import cutter, join, settle
from twinflow_train.errors import UserError
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.weights import Weights

AT_ONCE = 100_000_000
"""Numbers of which gradients are reduced, or weights updated, at once: each takes a buffer."""


@dataclass(kw_only=True)
class ZeRO3(Engine):
    """DeepSpeed's ZeRO-3: each tensor is flattened and cut into equal parts, one a rank.

    It fetches weights ahead along the order of the pass before. A step mixes passes with and
    without gradient, so backward passes fetch as they go, which FSDP2's do not.

    While a network loads, all ranks together hold at most 1.3 times its bytes, as with FSDP2.
    Then a trained number takes 20 bytes in float32 (what is gathered, master, gradient and two
    moments), in bfloat16 18, and in each average 4 or 6.

    offload_optimizer: keep float32 weights, their gradients and moments in host memory, and let
        the CPU take the optimizer's step.
    offload_weights: keep in host memory the shards that the student is gathered from.
    bf16_reduce: reduce gradients in bfloat16: half the traffic, a little noise.
    """

    offload_optimizer: bool = False
    offload_weights: bool = False
    bf16_reduce: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_products:
            raise UserError(
                "engine.keep_products does not work with engine=zero3, which gathers inside of "
                "blocks: choose engine=fsdp2"
            )

    def shard(
        self,
        model: Model,
        weights: Weights,
        *,
        optim: Optim,
        decay: float,
        average: Averages,
        world: World,
    ) -> ShardedZeRO3:
        """Build, shard and fill the networks (see `Engine`)."""
        if isinstance(optim, AdamW8bit):
            raise UserError(
                "optim=adamw8bit does not work with engine=zero3, where all tensors share one flat "
                "moment: choose optim=adamw or engine=fsdp2"
            )
        if average.bf16 and self.precision is not Precision.bf16:
            raise UserError(
                "average.bf16 with engine=zero3 needs engine.precision=bf16: a network computes in "
                "the type that its shards have"
            )
        decays = average.decays(decay)
        join(world)
        config = self._config(world, host_weights=self.offload_weights, clip=optim.clip)
        student = Network.trained(self._network(model, world, config), config, optim, world)
        config = self._config(world, host_weights=average.offload)
        second = {
            kind: Network.frozen(self._network(model, world, config), config, average, world)
            for kind in decays
        }
        if "frozen" in second:
            second["frozen"].net.keep_own_clock()
        for network in (student, *second.values()):
            network.fill(weights)
        settle(world)
        return ShardedZeRO3(student, second, decays=decays, world=world)

    def _config(self, world: World, *, host_weights: bool, clip: float = 0.0) -> dict[str, Any]:
        """Say to DeepSpeed what our options mean."""
        host = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # asked for and not used
            "bf16": {"enabled": self.precision is Precision.bf16},
            "communication_data_type": "bf16" if self.bf16_reduce else "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU too
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": AT_ONCE,
                "sub_group_size": AT_ONCE,
                # Else small tensors stay gathered, and are out of date once the shards change.
                "stage3_param_persistence_threshold": 0,
                # Where nothing is recomputed autograd keeps what a matrix product was gathered
                # from until the backward pass; DeepSpeed's own linear function does not.
                "memory_efficient_linear": self.recompute != 1,
                **({"offload_param": host} if host_weights else {}),
                **({"offload_optimizer": host} if self.offload_optimizer else {}),
            },
        }

    def _network(self, model: Model, world: World, config: dict[str, Any]) -> VelocityNet:
        """Build one network on meta and cut it; each rank reads its own part afterwards.

        ZeRO-3 cuts only whole tensors. Here they are empty and go a layer at a time.
        """
        net, cut = model.build().to(self.precision.dtype), cutter()
        if self.recompute:
            net.recompute(recompute_every(self.recompute, len(net.blocks)))
        for module in reversed(list(net.modules())):  # what is inside of another one first
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=world.device, recurse=False)
                cut(module=module, config_dict_or_path=config)
        return net


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's part of a parameter; the last parts are padded, so that all are equally long.

    name, shape: of the whole. offset: where the part begins in the whole, flattened.
    state: the part itself, padded. source: what the parameter is gathered from, in the type that
    the network computes in; the same tensor if the types agree. moments: the optimizer's, padded.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    state: Tensor
    source: Tensor
    moments: Mapping[str, Tensor]

    @staticmethod
    def of(
        name: str, parameter: Any, state: Tensor, moments: Mapping[str, Tensor], world: World
    ) -> Part:
        """Describe this rank's part of a cut parameter."""
        return Part(
            name=name,
            shape=tuple(parameter.ds_shape),
            offset=world.rank * parameter.partition_numel(),
            state=state,
            source=parameter.ds_tensor,
            moments=moments,
        )

    def local(self, padded: Tensor) -> Tensor:
        """Leave out the padding."""
        return padded[: max(0, math.prod(self.shape) - self.offset)]

    def span(self, kind: str, padded: Tensor) -> Span:
        """Describe the state or a moment."""
        return Span(
            kind=kind,
            name=self.name,
            shape=self.shape,
            offset=min(self.offset, math.prod(self.shape)),
            local=self.local(padded),
        )

    def fill(self, weights: Weights) -> None:
        """Read this rank's rows of the weights, the first and the last of them perhaps in part."""
        self.state.zero_()
        local, width = self.local(self.state), math.prod(self.shape[1:])
        if local.numel():
            first, last = self.offset // width, -(-(self.offset + len(local)) // width)
            rows = weights.read(self.name, torch.Size(self.shape), first, last).reshape(-1)
            begin = self.offset - first * width
            local.copy_(rows[begin : begin + len(local)])


class Network:
    """A network under ZeRO-3 and this rank's parts of it; `engine` is DeepSpeed's around `net`."""

    def __init__(self, engine: Any, net: VelocityNet, parts: Sequence[Part]) -> None:
        self.engine, self.net, self.parts = engine, net, parts

    @staticmethod
    def trained(net: VelocityNet, config: dict[str, Any], optim: Optim, world: World) -> Network:
        """Let ZeRO-3 train a cut network; its parts are views into what ZeRO-3 holds."""
        import deepspeed

        engine, zero, *_ = deepspeed.initialize(
            model=net,
            optimizer=optim.build([p for p in net.parameters() if p.requires_grad]),
            config=config,
            dist_init_required=False,
        )
        # Cut tensors have no numbers of their own: the moments above are empty.
        zero.optimizer.state = optim.build(zero.fp32_partitioned_groups_flat).state
        masters = _masters(zero)
        parts = []
        for name, parameter in _named(net):
            if parameter in masters:
                state, moments = masters[parameter]
            else:  # frozen: ZeRO-3 has no float32 of it
                state, moments = _held(parameter.ds_tensor, torch.float32, zero.device), {}
            parts.append(Part.of(name, parameter, state, moments, world))
        return Network(engine, net, parts)

    @staticmethod
    def frozen(
        net: VelocityNet, config: dict[str, Any], average: Averages, world: World
    ) -> Network:
        """Let ZeRO-3 gather a cut network that is not trained."""
        import deepspeed

        net.requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=net, config=config, dist_init_required=False)
        dtype = torch.bfloat16 if average.bf16 else torch.float32
        parts = []
        for name, parameter in _named(net):
            state = _held(parameter.ds_tensor, dtype, parameter.ds_tensor.device)
            parts.append(Part.of(name, parameter, state, {}, world))
        return Network(engine, net, parts)

    def fill(self, weights: Weights) -> None:
        """Load the weights."""
        for part in self.parts:
            part.fill(weights)
        self.commit()

    @torch.no_grad()
    def commit(self) -> None:
        """Compute with the present state from now on."""
        torch._foreach_copy_([p.source for p in self.parts], [p.state for p in self.parts])
        self.engine.optimizer.empty_partition_cache()  # gathered before


def _named(net: VelocityNet) -> Iterator[tuple[str, Any]]:
    """Yield a network's cut parameters, with more to them than torch knows, and stored names."""
    yield from ((net.stored_name(name), parameter) for name, parameter in net.named_parameters())


def _masters(zero: Any) -> dict[Tensor, tuple[Tensor, dict[str, Tensor]]]:
    """Find each trained parameter's float32 part and its moments in ZeRO-3's flat ones."""
    found = {}
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.partition_numel() for parameter in group]
        states = flat.detach().split(sizes)
        moments = [zero.optimizer.state[flat][kind].split(sizes) for kind in MOMENTS]
        for parameter, state, *rest in zip(group, states, *moments, strict=True):
            found[parameter] = state, dict(zip(MOMENTS, rest, strict=True))
    return found


def _held(source: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Give a shard itself if it has the type, else room for one that has."""
    return source if source.dtype == dtype else torch.zeros_like(source, dtype=dtype, device=device)


class ShardedZeRO3:
    """A student and the networks that follow it under ZeRO-3 (see `Sharded`)."""

    def __init__(
        self,
        student: Network,
        second: Mapping[str, Network],
        *,
        decays: Mapping[str, float],
        world: World,
    ) -> None:
        self._decays, self._world = decays, world
        self._engine = student.engine
        self._networks = {"model": student, **second}
        self.updates = 0
        # Through the engine, which counts the micro-steps; the others have none to count.
        self.student: Velocity = student.engine
        teacher = second.get("frozen") or second.get("average")
        self.teacher: Velocity = teacher.net if teacher else self.student
        self.averages: Mapping[str, Velocity] = {
            kind: network.net for kind, network in second.items() if decays[kind] < 1
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each of the student's parameters, by its name in weight files."""
        return {part.name: part.shape for part in self._networks["model"].parts}

    def networks(self) -> dict[str, Velocity]:
        """Name the networks to evaluate: "raw" and, where there are averages, "ema" and "slow"."""
        return evaluated(self.student, self.averages)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the loss; reduces at once.

        ZeRO-3 averages over ranks, the loss is summed over them: hence the factor.
        """
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        depth = len(FWD_MODULE_STACK)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world.size)
        # What is computed anew ends in the middle of a block, and ZeRO-3 would keep note of it.
        del FWD_MODULE_STACK[depth:]

    def step(self, rate: float) -> Tensor:
        """Clip, update, average and clear; return the global gradient norm before clipping.

        Raises:
            UserError: it is not finite; alike on every rank, and nothing was updated.
        """
        set_rate(self._engine.optimizer.optimizer, rate)
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            raise not_finite(norm, self.updates)
        self.updates += 1
        masters = [part.state for part in self._networks["model"].parts]
        for kind, decay in self._decays.items():
            if decay < 1:
                now = decay_at(decay, self.updates)
                average = [part.state for part in self._networks[kind].parts]
                follow(average, masters, now, path=(kind, self.updates, self._world.rank))
                self._networks[kind].commit()
        settle(self._world)
        return norm

    def discard(self) -> Tensor:
        """Forget the accumulated gradient without an update; return its global norm."""
        zero = self._engine.optimizer
        norms = [torch.as_tensor(norm).float() for norm in zero._get_norm_groups()]
        zero._overflow_clean_up(1.0)  # what DeepSpeed calls after a step that it does not take
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def spans(self) -> Iterator[Span]:
        """Yield this rank's part of every parameter, average and moment as flat views."""
        for kind, network in self._networks.items():
            for part in network.parts:
                yield part.span(kind, part.state)
        for part in self._networks["model"].parts:
            for kind, moment in part.moments.items():
                yield part.span(kind, moment)

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        self.updates = updates
        set_updates(self._engine.optimizer.optimizer, updates)
        for network in self._networks.values():
            network.commit()
        settle(self._world)

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of a kind of weights on rank 0; collective."""
        for part in self._networks[kind].parts:
            parts = self._world.gather(part.state.to(self._world.device))
            if self._world.main:
                yield part.name, parts.flatten()[: math.prod(part.shape)].view(part.shape).cpu()
