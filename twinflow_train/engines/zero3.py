"""Sharding by DeepSpeed's ZeRO-3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinflow_train.dist import World
from twinflow_train.engines.average import Averages, decay_at, follow
from twinflow_train.engines.base import NO_LIMITS, Engine, Networks, Precision, Span, Taken, allowed
from twinflow_train.engines.optim import AdamW8bit, Optim, set_rate, set_updates
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.engines.zero3_parts import Part, held, masters
from twinflow_train.engines.zero3_setup import cutter, join, settle
from twinflow_train.errors import UserError
from twinflow_train.models.adapter import BASE, Adapter, Assembly
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
        adapter: Adapter,
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
        assemblies = adapter.assemble(model, list(decays))
        modules = [self._module(one, optim, average, world) for one in assemblies]
        for module in modules:
            module.fill(weights)
        settle(world)
        return ShardedZeRO3(modules, decays=decays, world=world)

    def _module(self, assembly: Assembly, optim: Optim, average: Averages, world: World) -> Module:
        """Cut a module, hand it to ZeRO-3, and find this rank's parts in what that holds."""
        host = self.offload_weights if assembly.trained else average.offload
        clip = optim.clip if assembly.trained else 0.0
        config = self._config(world, host_weights=host, clip=clip)
        self._cut(assembly.net, world, config)
        types = {kind: self.held(kind, average) for kind, _ in assembly.owners.values()}
        return Module.of(assembly, config, optim if assembly.trained else None, types, world)

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

    def _cut(self, net: VelocityNet, world: World, config: dict[str, Any]) -> None:
        """Cut a network that is on meta; each rank reads its own part afterwards.

        ZeRO-3 cuts only whole tensors. Here they are empty and go a layer at a time.
        """
        net.to(self.precision.dtype)
        cut = cutter()
        if self.recompute:
            net.recompute(recompute_every(self.recompute, len(net.blocks)))
        for module in reversed(list(net.modules())):  # what is inside of another one first
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=world.device, recurse=False)
                cut(module=module, config_dict_or_path=config)


class Module:
    """An assembly under ZeRO-3 and this rank's parts of it, by kind; `engine` is DeepSpeed's."""

    def __init__(
        self, engine: Any, assembly: Assembly, parts: Mapping[str, Sequence[Part]]
    ) -> None:
        self.engine, self.assembly, self.parts = engine, assembly, parts

    @staticmethod
    def of(
        assembly: Assembly,
        config: dict[str, Any],
        optim: Optim | None,
        types: Mapping[str, torch.dtype],
        world: World,
    ) -> Module:
        """Let ZeRO-3 gather a cut module, and train it if there is an optimizer.

        types: in which the parts of each kind are held. Those that are trained are views into what
        ZeRO-3 holds.
        """
        import deepspeed

        trained = [p for p in assembly.net.parameters() if p.requires_grad] if optim else []
        engine, zero, *_ = deepspeed.initialize(
            model=assembly.net,
            optimizer=optim.build(trained) if optim else None,
            config=config,
            dist_init_required=False,
        )
        updated = {}
        if optim:
            # Cut tensors have no numbers of their own: the moments above are empty.
            zero.optimizer.state = optim.build(zero.fp32_partitioned_groups_flat).state
            updated = masters(zero)
        parts: dict[str, list[Part]] = {}
        parameter: Any  # with more to it than torch knows
        for kind, name, parameter in assembly.tensors():
            if parameter in updated:
                state, moments = updated[parameter]
            else:  # ZeRO-3 has it in the type that the network computes in, and no other
                device = zero.device if kind == "model" and optim else parameter.ds_tensor.device
                state, moments = held(parameter.ds_tensor, types[kind], device), {}
            parts.setdefault(kind, []).append(Part.of(name, parameter, state, moments, world))
        return Module(engine, assembly, parts)

    def fill(self, weights: Weights) -> None:
        """Load the weights."""
        for parts in self.parts.values():
            for part in parts:
                part.fill(weights)
        self.commit(self.parts.keys())

    @torch.no_grad()
    def commit(self, kinds: Iterable[str]) -> None:
        """Compute with the present state of these kinds from now on."""
        parts = [part for kind in kinds for part in self.parts.get(kind, ())]
        torch._foreach_copy_([p.source for p in parts], [p.state for p in parts])
        self.engine.optimizer.empty_partition_cache()  # gathered before


class ShardedZeRO3(Networks):
    """A student and the networks that follow it under ZeRO-3 (see `Sharded`)."""

    def __init__(
        self, modules: Sequence[Module], *, decays: Mapping[str, float], world: World
    ) -> None:
        found = {kind: each for m in modules for kind, each in m.assembly.networks.items()}
        self._modules, self._engine = modules, modules[0].engine
        # Through the engine, which counts the micro-steps; the others have none to count.
        super().__init__(found | {"model": self._engine}, decays)
        self._decays, self._world, self.updates = decays, world, 0
        self._parts = {kind: parts for m in modules for kind, parts in m.parts.items()}
        base = self._parts.pop(BASE, ())
        self.frozen = sum(math.prod(part.shape) for part in base)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each of the student's own parameters, by its name in weight files."""
        return {part.name: part.shape for part in self._parts["model"]}

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

    def step(
        self,
        rate: float,
        *,
        number: int = 0,
        loss: Tensor | None = None,
        limits: tuple[float, float] = NO_LIMITS,
    ) -> Taken:
        """Clip, update, average and clear (see `Sharded.step`).

        DeepSpeed looks at the norm before each update, so this waits for the device. Limits take a
        second look at the gradients.
        """
        no, yes = (torch.tensor(flag, device=self._world.device) for flag in (False, True))
        bad = loss is not None and not bool(loss.isfinite())
        if bad or min(limits) < math.inf:
            norm = self._norm()
            if not bool(allowed(norm, loss, limits)):
                self._clear()
                return Taken(norm=norm, updated=no)
        set_rate(self._engine.optimizer.optimizer, rate)
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():  # DeepSpeed has cleared it
            return Taken(norm=torch.full_like(norm, math.inf), updated=no)
        self.updates += 1
        states = [part.state for part in self._parts["model"]]
        for kind in self.averages:
            now = decay_at(self._decays[kind], self.updates)
            average = [part.state for part in self._parts[kind]]
            follow(average, states, now, path=(kind, number, self._world.rank))
        for module in self._modules:
            if following := self.averages.keys() & module.parts.keys():
                module.commit(following)
        settle(self._world)
        return Taken(norm=norm, updated=yes)

    def discard(self) -> Tensor:
        """Forget the accumulated gradient without an update; return its global norm."""
        norm = self._norm()
        self._clear()
        return norm

    def _norm(self) -> Tensor:
        groups = self._engine.optimizer._get_norm_groups()
        norms = torch.stack([torch.as_tensor(norm).float() for norm in groups])
        # DeepSpeed says -1 of what is not finite.
        norm: Tensor = torch.linalg.vector_norm(norms.where(norms >= 0, math.inf))
        return norm

    def _clear(self) -> None:
        """Forget the gradient, as DeepSpeed does after a step that it does not take."""
        self._engine.optimizer._overflow_clean_up(1.0)

    def spans(self) -> Iterator[Span]:
        """Yield this rank's part of every parameter, average and moment as flat views."""
        for kind, parts in self._parts.items():
            for part in parts:
                yield part.span(kind, part.state)
        for part in self._parts["model"]:
            for kind, moment in part.moments.items():
                yield part.span(kind, moment)

    def restored(self, updates: int) -> None:
        """Take note that the spans were filled from a checkpoint after `updates` updates."""
        self.updates = updates
        set_updates(self._engine.optimizer.optimizer, updates)
        for module in self._modules:
            module.commit(self._parts.keys())
        settle(self._world)

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of a kind of weights on rank 0; collective."""
        for part in self._parts[kind]:
            parts = self._world.gather(part.state.to(self._world.device))
            if self._world.main:
                yield part.name, parts.flatten()[: math.prod(part.shape)].view(part.shape).cpu()
