"""Two times through one stock transformer: its time embedder swapped for a pair of them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinflow_train.models.weights import RandomWeights

FRESH_STD = 0.02


class TargetTime(Enum):
    """How the target time r enters the network.

    embedder: through a second time embedder, trained with the rest.
    shift: the one embedder gets t - r / 2, as in the published LoRA runs; (0.5, 0) and (1, 1)
    then look alike. A frozen teacher stays on its own clock.
    shift_all: the same, and a frozen teacher is shifted too: to repeat published LoRA runs.
    """

    embedder = "embedder"
    shift = "shift"
    shift_all = "shift_all"

    @property
    def shifts(self) -> bool:
        """Whether there is but one embedder."""
        return self is not TargetTime.embedder


@dataclass(frozen=True, kw_only=True)
class SecondEmbedder:
    """A family's second time embedder.

    first: name of the stock module that embeds times. name: what weight files call the second.
    copied: it starts as a copy of the first; else with normal(0, 0.02) weights and zero biases.
    """

    first: str
    name: str
    copied: bool

    def aliases(self) -> dict[str, str]:
        """Map the second one's prefix to that of the weights it starts from."""
        return {f"{self.name}.": f"{self.first}."} if self.copied else {}

    def fresh(self, seed: int) -> Mapping[str, RandomWeights]:
        """Give the weights it starts with if it is no copy, under its prefix."""
        return {} if self.copied else {f"{self.name}.": RandomWeights(seed, _fresh, {})}


def _fresh(name: str, shape: torch.Size) -> tuple[str, float]:
    return ("constant", 0.0) if name.endswith("bias") else ("normal", FRESH_STD)


PARTS = 3
"""bfloat16 numbers that carry one float32: 3 x 8 significant bits cover its 24."""


def pack_times(t: Float[Tensor, " b"], r: Float[Tensor, " b"]) -> Float[Tensor, "b 6"]:
    """Write (t, r) as six bfloat16 numbers a row, whose sums give both times back exactly.

    Stock transformers cast their `timestep` to the compute type; in bfloat16 0.999 would become
    1.0. The leading three parts sum to t, the others to r (float64 times are rounded to float32).
    """
    parts = []
    for time in (t, r):
        rest = time.float()
        for _ in range(PARTS):
            part = rest.bfloat16()
            parts.append(part)
            rest = rest - part.float()
    return torch.stack(parts, dim=-1)


def unpack_times(times: Float[Tensor, "b 6"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Recover the float32 times (t, r) that `pack_times` wrote."""
    t, r = times.float().unflatten(-1, (2, PARTS)).sum(-1).unbind(-1)
    return t, r


Clock = Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]]
"""Turns our times, 1 is noise, into those that a stock embedder takes."""
Embedded = Tensor | tuple[Tensor, ...]
"""What a stock embedder gives: one tensor (b, width), or several."""


def own_time(t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Leave times in [0, 1]."""
    return t


def thousandths(t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Count from 0 to 1000."""
    return 1000 * t


class TwoTimes(nn.Module):
    """embed(clock(t)) + (t - r) embed_r(clock(r)), in place of a stock time embedder.

    It vanishes on the diagonal r = t, so a pretrained velocity field is intact at the start. Of an
    embedder that gives several tensors each is such a sum.
    """

    def __init__(self, embed: nn.Module, *, clock: Clock = own_time) -> None:
        super().__init__()
        self.embed = embed
        self.embed_r = copy.deepcopy(embed)
        self.clock = clock

    def forward(self, times: Float[Tensor, "b 6"], *context: object, **named: object) -> Embedded:
        """Embed packed times; the others are what the stock embedder takes after its timestep."""
        t, r = unpack_times(times)
        at_t: Embedded = self.embed(self.clock(t), *context, **named)
        at_r: Embedded = self.embed_r(self.clock(r), *context, **named)
        gap = (t - r)[:, None]
        if isinstance(at_t, Tensor):
            assert isinstance(at_r, Tensor), "the second embedder is another one"
            return at_t + gap.to(at_r.dtype) * at_r
        return tuple(a + gap.to(b.dtype) * b for a, b in zip(at_t, at_r, strict=True))


class ShiftedTime(nn.Module):
    """embed(clock(t - r / 2)), in place of a stock time embedder; `own_clock`: embed(clock(t))."""

    def __init__(self, embed: nn.Module, *, clock: Clock = own_time) -> None:
        super().__init__()
        self.embed = embed
        self.clock = clock
        self.own_clock = False

    def forward(self, times: Float[Tensor, "b 6"], *context: object, **named: object) -> Embedded:
        """Embed packed times; the others are what the stock embedder takes after its timestep."""
        t, r = unpack_times(times)
        time = self.clock(t if self.own_clock else t - r / 2)
        embedding: Embedded = self.embed(time, *context, **named)
        return embedding
