"""Two times through one stock transformer: its time embedder swapped for a pair of them."""

import copy
from collections.abc import Mapping
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


class TwoTimes(nn.Module):
    """embed(unit t) + (t - r) embed_r(unit r), in place of a stock time embedder.

    It vanishes on the diagonal r = t, so a pretrained velocity field is intact at the start.
    `unit` is 1 where the stock embedder takes times in [0, 1] and 1000 where it takes [0, 1000].
    """

    def __init__(self, embed: nn.Module, *, unit: float = 1.0) -> None:
        super().__init__()
        self.embed = embed
        self.embed_r = copy.deepcopy(embed)
        self.unit = unit

    def forward(self, times: Float[Tensor, "b 6"], *context: object) -> Float[Tensor, "b width"]:
        """Embed packed times; `context` is what the stock embedder takes after its timestep."""
        t, r = unpack_times(times)
        at_t = self.embed(self.unit * t, *context)
        at_r = self.embed_r(self.unit * r, *context)
        embedding: Tensor = at_t + (t - r)[:, None].to(at_r.dtype) * at_r
        return embedding


class ShiftedTime(nn.Module):
    """embed(unit (t - r / 2)), in place of a stock time embedder; `own_clock`: embed(unit t)."""

    def __init__(self, embed: nn.Module, *, unit: float = 1.0) -> None:
        super().__init__()
        self.embed = embed
        self.unit = unit
        self.own_clock = False

    def forward(self, times: Float[Tensor, "b 6"], *context: object) -> Float[Tensor, "b width"]:
        """Embed packed times; `context` is what the stock embedder takes after its timestep."""
        t, r = unpack_times(times)
        embedding: Tensor = self.embed(self.unit * (t if self.own_clock else t - r / 2), *context)
        return embedding
