"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twinflow_train.planner.gpus import GIB
from twinflow_train.planner.plan import CONTEXT, FRAGMENTS, USE, Plan, refusal

HOUR = 3600


def lines(plan: Plan, *, steps: int, price_per_hour: float, remedies: Sequence[str]) -> list[str]:
    """Say what a plan comes to; `remedies` is what would make it fit."""
    return [*_memory(plan, remedies), *_work(plan), *_time(plan, steps, price_per_hour)]


def _memory(plan: Plan, remedies: Sequence[str]) -> Iterator[str]:
    memory, gpu = plan.memory, plan.gpu
    yield f"memory of a GPU (GiB), {plan.job.ranks} in all:"
    rows = memory.items() | {
        f"fragmentation ({FRAGMENTS:.0%})": memory.peak * FRAGMENTS,
        "driver and collectives": CONTEXT,
    }
    for name, value in rows.items():
        yield f"  {name:<26}{value / GIB:8.2f}"
    verdict = "fits" if plan.fits else "does not fit"
    yield f"  {'in all':<26}{plan.needed / GIB:8.2f} of {gpu.memory / GIB:.1f}: {verdict}"
    for name, value in memory.host.items():
        yield f"  in host memory, {name:<10}{value / GIB:8.2f} for each GPU"
    if not plan.fits:
        yield refusal(plan.needed, gpu.memory, remedies)


def _work(plan: Plan) -> Iterator[str]:
    total = sum(plan.operations.values())
    yield f"operations of a GPU's step: {total / 1e12:,.3g} TFLOP"
    for name, value in plan.operations.items():
        if value:
            yield f"  {name:<26}{value / 1e12:10,.4g}"
    yield f"  {'computed again':<26}{plan.again / 1e12:10,.4g}"
    yield f"sent by a GPU in a step: {plan.sent / 1e9:,.3g} GB"


def _time(plan: Plan, steps: int, price_per_hour: float) -> Iterator[str]:
    least, most = plan.seconds
    low, high = plan.use
    yield (
        f"a step: {least:.3g} to {most:.3g} s, MFU {low:.0%} to {high:.0%} (if kernels reach "
        f"{USE[0]:.0%} to {USE[1]:.0%} of the GPU's peak; not measured)"
    )
    hours = [steps * seconds * plan.job.ranks / HOUR for seconds in plan.seconds]
    yield f"{steps:,} steps: {hours[0]:,.0f} to {hours[1]:,.0f} GPU-hours"
    if price_per_hour:
        yield f"  at {price_per_hour:g} an hour: {hours[0] * price_per_hour:,.0f} to " + (
            f"{hours[1] * price_per_hour:,.0f}"
        )
