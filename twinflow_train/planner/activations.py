"""Memory that a micro-step takes beside the state: read from it over tensors without numbers.

The objective runs on the networks as they are, on meta, where every tensor has a size and takes no
memory. What sharding adds at each block (gathered weights, gradients on their way) is arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twinflow_train.batch import Batch, Velocity
from twinflow_train.draws import Draws
from twinflow_train.models.base import VelocityNet
from twinflow_train.objectives.twinflow import TwinFlow


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """What an engine takes for a group of parameters, in bytes: a block, or what is in none.

    gathered: its weights as it computes. flat: what they arrive in. sent: what its gradients leave
    in, held until the next group's leave. summed: a copy in which they are summed. shard: what is
    left of them on this rank. updated: what its update takes, where that comes before the gradients
    are freed.
    """

    gathered: float = 0.0
    flat: float = 0.0
    sent: float = 0.0
    summed: float = 0.0
    shard: float = 0.0
    updated: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Most bytes held beside the state while a micro-step is in a phase, and what is kept.

    passes: passes without gradient before the one with it, forward: that one, after: those without
    gradient after it. backward: the gradient, with what is kept for it, and of its shards only the
    one that comes about. last: its last two blocks, less the shards that are then still to come.
    kept: activations held from the forward pass to the gradient. gathered: the most that the
    engine's buffers and a block's gradients took.
    """

    passes: float
    forward: float
    after: float
    backward: float
    last: float
    kept: float
    gathered: float

    def deeper(self, other: Peaks, times: float) -> Peaks:
        """Go on to more depth: `other` is one unit deeper than this, the result `times` units."""
        theirs = vars(other)
        return Peaks(**{n: v + times * (theirs[n] - v) for n, v in vars(self).items()})


class Attention(TorchFunctionMode):
    """Lets attention keep what its fused kernels keep: not the square of the length."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run a function, attention as its kernel for the CPU."""
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | named
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        three = [given[name] for name in ("query", "key", "value")]
        mask, scale = given.get("attn_mask"), given.get("scale")
        return fused(*three, 0.0, False, attn_mask=mask, scale=scale)[0]


def fused(block: Callable[..., object]) -> Callable[..., object]:
    """Let a block have fused attention also where it is computed anew, out of the mode's reach."""

    def call(*inputs: Any) -> object:
        with Attention():
            return block(*inputs)

    return call


class Live(TorchDispatchMode):
    """Adds up the tensors that are alive, and `beside` them what no tensor stands for."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.bytes, self.beside, self.most, self.most_beside = 0, 0.0, 0.0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run an operation, and take note of the tensors that it made."""
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self._hold(storage)
        self.note()
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.bytes -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size

    def note(self) -> None:
        """Take note of the most so far."""
        self.most = max(self.most, self.bytes + self.beside)
        self.most_beside = max(self.most_beside, self.beside)

    def take(self) -> float:
        """Return the most since the last time."""
        most, self.most = self.most, self.bytes + self.beside
        return most


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Sharding:
    """Follows a network's blocks and adds to `live` what an engine holds at each of them."""

    def __init__(
        self, net: VelocityNet, live: Live, blocks: Sequence[Buffers], rest: Buffers, *, free: bool
    ) -> None:
        self._live, self._blocks, self._rest, self._free = live, blocks, rest, free
        # What no gradient passes through stays gathered from the micro-step before.
        stays = not free and not any(p.requires_grad for p in net.parameters())
        self._held: set[int] = set(range(-1, len(blocks))) if stays else set()
        self._flat = self._sent = self._grown = self._left = self._made = self._counted = 0.0
        self.learning = False
        self._now: int | None = None
        self._turns: list[tuple[float, float]] = []
        net.register_forward_pre_hook(lambda *_: self._enter(-1))
        net.register_forward_hook(self._leave(-1))
        for number, block in enumerate(net.blocks):
            block.register_forward_pre_hook(lambda *_, n=number: self._enter(n))
            block.register_forward_hook(self._leave(number))
        inside = {id(p) for block in net.blocks for p in block.parameters()}
        for parameter in net.parameters():
            if parameter.requires_grad:
                arrived = self._arrived if id(parameter) in inside else self._stays
                parameter.register_post_accumulate_grad_hook(arrived)
        self._count()

    def _of(self, number: int) -> Buffers:
        return self._rest if number < 0 else self._blocks[number]

    def _count(self) -> None:
        held = sum(self._of(n).gathered for n in self._held)
        now = held + self._flat + self._sent + self._grown + self._left + self._made
        self._live.beside += now - self._counted
        self._counted = now
        self._live.note()

    def _enter(self, number: int) -> None:
        if self.learning:
            return
        if number not in self._held:
            self._flat = self._of(number).flat
            self._held.add(number)
        self._count()

    def _leave(self, number: int) -> Callable[..., None]:
        def leave(_: nn.Module, __: object, out: object) -> None:
            if self.learning:
                return
            if self._free:
                self._held.discard(number)
            if number < 0:
                self._flat = 0.0
            self._count()
            for tensor in _tensors(out):
                if tensor.requires_grad:
                    tensor.register_hook(lambda _, n=number: self._begin(n))

        return leave

    def _begin(self, number: int) -> None:
        """Come to a block on the way back: the one behind it is done, the next is on its way."""
        self.learning = True
        if number == self._now:
            return
        if self._now is not None and self._now >= 0:
            self._end(self._now)
        self._now = number
        self._held.add(number)
        self._flat = self._blocks[number - 1].flat if number > 0 else 0.0
        self._count()

    def _end(self, number: int) -> None:
        """Let the gradients of a block, or in the end of what is in none, leave.

        They are copied into one buffer and freed; only then they are summed into this rank's shard.
        """
        group = self._of(number)
        self._held.discard(number)
        self._sent = group.sent + group.updated
        self._count()
        self._sent, self._grown, self._made = group.sent, 0.0, group.summed + group.shard
        if number < 0:
            self._left = 0.0
        self._count()
        self._made = 0.0
        self._count()
        self._turns.append((self._live.take(), group.shard))

    def _arrived(self, parameter: Tensor) -> None:
        self._grown += self._taken(parameter)
        self._count()

    def _stays(self, parameter: Tensor) -> None:
        """Keep the gradient of what is in no block: the last of them comes at the very end."""
        self._left += self._taken(parameter)
        self._count()

    def _taken(self, parameter: Tensor) -> int:
        assert parameter.grad is not None
        size, parameter.grad = parameter.grad.nbytes, None
        return size

    @property
    def most(self) -> float:
        """The most of any block on the way back, with the shard that it makes."""
        return max((turn for turn, _ in self._turns), default=0.0)

    @property
    def most_at_last(self) -> float:
        """The most of the last two blocks and what is in none, less what is still to be made.

        Before them, shards are fewer, and only what is kept is more: its most is the first's.
        """
        found, to_come = 0.0, 0.0
        for turn, shard in reversed(self._turns[-3:]):
            to_come += shard
            found = max(found, turn - to_come)
        return found

    def finish(self) -> None:
        """End the last block and what is in none."""
        if self._now is not None:
            self._end(self._now)
            self._end(-1)
        self._held.clear()
        self._flat = self._sent = self._left = 0.0
        self._now, self.learning = None, False
        self._count()


def trace(
    objective: TwinFlow,
    nets: Mapping[int, VelocityNet],
    student: Velocity,
    teacher: Velocity,
    batch: Batch,
    draws: Draws,
    *,
    buffers: Callable[[VelocityNet], tuple[list[Buffers], Buffers]],
    free: Callable[[VelocityNet], bool],
) -> Peaks:
    """Run a micro-step of an objective over networks on meta and give the peaks of its phases.

    nets: every module that is a network or several, once. buffers: of each block of one, and of
    what is in none. free: whether a network's gathered weights are freed after each pass.
    """
    live = Live()
    found = [Sharding(net, live, *buffers(net), free=free(net)) for net in nets.values()]
    inside: dict[str, float] = {}

    def watched(x_t: Tensor, t: Tensor, r: Tensor, cond: Any, /) -> Tensor:
        if not torch.is_grad_enabled():
            return student(x_t, t, r, cond)
        inside["passes"] = live.take()
        out = student(x_t, t, r, cond)
        inside["forward"] = live.take()
        inside["kept"] = float(live.bytes)
        return out

    asked: Velocity = watched
    with Attention(), live:
        loss = objective.loss(asked, asked if teacher is student else teacher, batch, draws)
        inside["after"] = live.take()
        loss.total.backward()
        for one in found:
            one.finish()
    return Peaks(
        passes=inside["passes"],
        forward=inside["forward"],
        after=inside["after"],
        backward=max(one.most for one in found),
        last=max(one.most_at_last for one in found),
        kept=inside["kept"],
        gathered=live.most_beside,
    )
