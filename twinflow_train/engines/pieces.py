"""AdamW a tensor at a time and a piece of it at a time: weights and moments in few bits.

Numbers that a step depends on are tensors on the device, so that nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twinflow_train.engines.eightbit import Table, packed, table, unpacked
from twinflow_train.engines.optim import BLOCK, MOMENTS, AdamW8bit, Optim, Saved, in_blocks
from twinflow_train.engines.rounding import rounded

AT_ONCE = 1 << 24
"""Numbers that are updated at once: where the update is not one kernel, it takes WORKING bytes of
each beside the state."""
WORKING = 40


class Now(NamedTuple):
    """What an update reckons with, in float32 on the device.

    decay: what weight decay leaves of a weight. size: learning rate over the first moment's
    correction. root: of the second moment's correction. share: what clipping leaves of the
    gradient. fine: whether there is an update; if not, every number stays.
    """

    decay: Tensor
    size: Tensor
    root: Tensor
    share: Tensor
    fine: Tensor


class Rule(NamedTuple):
    """What stays the same from step to step; the tables are those of the two moments' codes."""

    betas: tuple[float, float]
    eps: float
    tables: tuple[Table, Table]


Moment = tuple[Tensor, ...]
"""A moment's float32 numbers, or its codes and scales."""


def advance(
    weights: Tensor,
    gradient: Tensor,
    moments: tuple[Moment, Moment],
    *,
    now: Now,
    rule: Rule,
    key: Tensor,
    start: int,
) -> None:
    """Update weights and moments in place, `start` numbers into their tensor.

    bfloat16 weights are rounded at random with the mean kept (see `rounded`).
    """
    old, scaled = weights.float(), gradient.float() * now.share
    first = _read(moments[0], rule.tables[0]).lerp(scaled, 1 - rule.betas[0])
    second = _read(moments[1], rule.tables[1]).lerp(scaled.square(), 1 - rule.betas[1])
    new = old * now.decay - now.size * first / (second.sqrt() / now.root + rule.eps)
    kept = torch.where(now.fine, new, old)
    weights.copy_(rounded(kept, key, start) if weights.dtype == torch.bfloat16 else kept)
    _write(moments[0], first, rule.tables[0], now.fine)
    _write(moments[1], second, rule.tables[1], now.fine)


def _read(moment: Moment, among: Table) -> Tensor:
    return moment[0] if len(moment) == 1 else unpacked(moment[0], moment[1], among)


def _write(moment: Moment, values: Tensor, among: Table, fine: Tensor) -> None:
    found = (values,) if len(moment) == 1 else packed(values, among)
    for ours, new in zip(moment, found, strict=True):
        ours.copy_(torch.where(fine, new, ours))


class Trained:
    """A parameter and its moments, zero at first; with `AdamW8bit` those of matrices have 8 bits.

    They are the same codes and scales as where the same optimizer works on shards.
    """

    def __init__(self, parameter: nn.Parameter, name: str, optim: Optim) -> None:
        self.parameter, self.name = parameter, name
        self.shape, numbers, device = tuple(parameter.shape), parameter.numel(), parameter.device
        self._width = BLOCK if isinstance(optim, AdamW8bit) and in_blocks(self.shape) else 1

        def moment() -> Moment:
            if self._width == 1:
                return (torch.zeros(numbers, device=device),)
            rows = numbers // BLOCK
            codes = torch.zeros(rows, BLOCK, dtype=torch.uint8, device=device)
            return codes, torch.zeros(rows, device=device)

        self.moments = moment(), moment()

    @torch.no_grad()
    def step(
        self, gradient: Tensor, update: Callable[..., Any], *, now: Now, rule: Rule, key: Tensor
    ) -> None:
        """Update it a piece at a time by `update`, which is `advance` or one kernel of it."""
        form = (-1,) if self._width == 1 else (-1, BLOCK)
        weights, gradient = self.parameter.view(form), gradient.reshape(form)
        rows = AT_ONCE // self._width
        for low in range(0, len(weights), rows):
            part = slice(low, low + rows)
            first, second = (tuple(each[part] for each in moment) for moment in self.moments)
            update(
                weights[part],
                gradient[part],
                (first, second),
                now=now,
                rule=rule,
                key=key,
                start=low * self._width,
            )

    def saved(self) -> Iterator[Saved]:
        """Yield what a checkpoint holds of the moments."""
        for kind, moment in zip(MOMENTS, self.moments, strict=True):
            if len(moment) == 1:
                yield Saved(kind=kind, local=moment[0])
            else:
                yield Saved(kind=f"{kind}_codes", local=moment[0].view(-1))
                yield Saved(kind=f"{kind}_scales", local=moment[1], block=BLOCK)


def rule_of(optim: Optim, device: torch.device) -> Rule:
    """Read off an optimizer what stays the same."""
    tables = table(device, signed=True), table(device, signed=False)
    return Rule((optim.betas[0], optim.betas[1]), optim.eps, tables)


def now_of(optim: Optim, rate: float, count: Tensor) -> Now:
    """Give what update number `count` (from 1, on the device) reckons with, unclipped."""
    betas, one = optim.betas, torch.ones((), device=count.device)
    decay, size, root = (
        torch.as_tensor(each, device=count.device).float()
        for each in (
            one * (1 - rate * optim.weight_decay),
            rate / (1 - torch.pow(betas[0], count.double())),
            (1 - torch.pow(betas[1], count.double())).sqrt(),
        )
    )
    return Now(decay=decay, size=size, root=root, share=one, fine=one.bool())
