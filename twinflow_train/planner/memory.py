"""Memory of one rank: the state that it holds for good, and the most that a step takes beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from twinflow_train.batch import Batch, Velocity
from twinflow_train.deal import Deal
from twinflow_train.engines import pieces
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import BLOCK, AdamW8bit, Optim, RAdam, in_blocks
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.engines.single import Single
from twinflow_train.engines.zero3 import AT_ONCE, ZeRO3
from twinflow_train.models.adapter import Adapter, Assembly
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.sana import Sana
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner.activations import Buffers, Peaks, fused, trace
from twinflow_train.planner.flops import inputs

LIVE = 1_000_000_000
"""Numbers that ZeRO-3 lets stay gathered in the hope that they are asked for again."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned: a run's parts, and the sizes of what it is fed.

    latent: height and width of the largest latents. text: tokens of the longest text.
    references: pictures besides, as large. ranks: GPUs. gloo: they are CPUs and talk by gloo, which
    sums gradients in a copy of its own.
    """

    model: Model
    adapter: Adapter
    objective: TwinFlow
    engine: Engine
    optim: Optim
    average: Averages
    batch: int
    micro_batch: int
    seed: int
    latent: tuple[int, int]
    text: int
    references: int = 0
    ranks: int = 1
    gloo: bool = False

    @property
    def over(self) -> int:
        """How many ranks one copy of the state is cut over."""
        return (self.engine.shard_over if isinstance(self.engine, FSDP2) else 0) or self.ranks

    @property
    def deal(self) -> Deal:
        """What the first rank is dealt."""
        return Deal(batch=self.batch, micro_batch=self.micro_batch, ranks=self.ranks, rank=0)

    def assemblies(self) -> list[Assembly]:
        """Build the networks on meta."""
        beside = list(self.average.decays(self.objective.teacher_decay))
        return self.adapter.assemble(self.model, beside)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank by item, on its GPU and in host memory, when a step takes most.

    state: held for good. peaks: most beside it by phase (see `Peaks`); update: most in the
    optimizer's step. grads: of the whole gradient's shards. accumulates: whether they outlive a
    micro-step. buffers: what the engine's buffers hold.
    """

    state: dict[str, float]
    host: dict[str, float]
    peaks: Peaks
    update: float
    grads: float
    accumulates: bool
    blocks: int = 1
    buffers: str = "gathered blocks"

    @property
    def held(self) -> float:
        """Bytes that are held from the first step to the last."""
        return sum(self.state.values())

    @property
    def beside(self) -> dict[str, float]:
        """The most of each phase beside what is held, with what is there of the gradient."""
        peaks, full = self.peaks, self.grads
        early = full if self.accumulates else 0.0
        return {
            "passes without gradient": max(peaks.passes, peaks.after) + early,
            "forward": peaks.forward + early,
            "gradient": max(peaks.backward + max(early, full / self.blocks), peaks.last + full),
            "update": self.update + full,
        }

    @property
    def peak(self) -> float:
        """The most bytes that tensors take at once."""
        return self.held + max(self.beside.values())

    def items(self) -> dict[str, float]:
        """Divide the peak: what is held, and what the hungriest phase takes."""
        beside = max(self.beside.values())
        kept = min(self.peaks.kept, beside)
        gathered = min(self.peaks.gathered, beside - kept)
        grads = min(self.grads, beside - kept - gathered)
        return self.state | {
            "gradients": grads,
            "activations kept": kept,
            self.buffers: gathered,
            "intermediates": beside - kept - gathered - grads,
        }


def latent_side(model: Model, pixels: int) -> int:
    """Give the side of the latents of a square picture, which divides into whole tokens."""
    pixel_space = model.channels in (1, 3)
    factor = 1 if pixel_space else 32 if isinstance(model, Sana) else 8
    step = factor * model.patch
    return max(1, pixels // step) * model.patch


def memory(job: Job) -> Memory:
    """Reckon what the first rank of a job holds, the one that holds most."""
    assemblies = job.assemblies()
    state, host, grads = held(job, assemblies)
    at_once = isinstance(job.engine, Single)  # nothing of the gradient is left for later
    elsewhere = at_once or (isinstance(job.engine, FSDP2) and job.engine.offload)
    return Memory(
        state={name: value for name, value in state.items() if value},
        host={name: value for name, value in host.items() if value},
        peaks=peaks(job),
        update=0.0 if elsewhere else largest(job, assemblies),
        grads=0.0 if elsewhere else grads,
        accumulates=job.deal.micro_steps > 1,
        blocks=max(len(one.net.blocks) for one in assemblies),
        buffers="a block's gradient, update" if at_once else "gathered blocks",
    )


def cut(job: Job, shape: Sequence[int]) -> int:
    """Count a rank's numbers of a tensor: whole rows by FSDP2, of ZeRO-3 an equal part."""
    if isinstance(job.engine, ZeRO3):
        return -(-math.prod(shape) // job.over)
    return -(-shape[0] // job.over) * math.prod(shape[1:])


def held(
    job: Job, assemblies: Sequence[Assembly]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Add up weights, moments and averages, on the GPU and the host, and the gradient's shards."""
    gpu = dict.fromkeys(("weights", "optimizer", "averages"), 0.0)
    host, grads, engine = dict(gpu), 0.0, job.engine
    zero, size = isinstance(engine, ZeRO3), engine.precision.dtype.itemsize
    on_host = isinstance(engine, FSDP2) and engine.offload
    for one in assemblies:
        for kind, _, parameter in one.tensors():
            numbers, own = cut(job, parameter.shape), engine.held(kind, job.average).itemsize
            trained = kind == "model" and parameter.requires_grad
            away = on_host if one.trained else job.average.offload
            item = "weights" if one.trained and kind in ("model", "base") else "averages"
            (host if away else gpu)[item] += numbers * (size if zero and kind == "base" else own)
            if zero and (trained or size != own):
                away = isinstance(engine, ZeRO3) and engine.offload_weights
                (host if away else gpu)[item] += numbers * size
            if trained:
                place = host if on_host else gpu
                place["optimizer"] += moments(job.optim, numbers, parameter.shape)
                grads += 4 * numbers
    if isinstance(engine, ZeRO3) and engine.offload_optimizer:
        host["optimizer"], gpu["optimizer"] = gpu["optimizer"], 0.0
        masters = sum(
            4 * cut(job, p.shape)
            for one in assemblies
            for kind, _, p in one.tensors()
            if kind == "model"
        )
        gpu["weights"] -= masters
        host["weights"] += masters + grads
        grads = 0.0
    return gpu, host, grads


def moments(optim: Optim, numbers: int, shape: Sequence[int]) -> float:
    """Give the bytes of both moments of so many numbers."""
    if isinstance(optim, AdamW8bit) and in_blocks(shape):
        return numbers * 2 * (1 + 4 / BLOCK)
    return numbers * 8


def largest(job: Job, assemblies: Sequence[Assembly]) -> float:
    """Give what updating takes beside the gradient: temporary numbers of the optimizer's."""
    trained = [
        cut(job, p.shape)
        for one in assemblies
        for kind, _, p in one.tensors()
        if kind == "model" and p.requires_grad
    ]
    most = 4.0 * max(trained)
    wanted = 0.0
    if isinstance(job.optim, RAdam):
        wanted = 4.0 * sum(trained)  # a square root of every second moment at once
    if isinstance(job.optim, AdamW8bit):
        wanted = 5 * most  # one tensor's moments, unpacked, and what is made of them
    average = job.average
    if average.decays(job.objective.teacher_decay) and (average.bf16 or average.offload):
        wanted = max(wanted, 3 * most)
    return wanted


def buffers(job: Job, net: VelocityNet) -> tuple[list[Buffers], Buffers]:
    """Give what sharding takes for each block, and for what is in none."""
    inside = [list(block.parameters()) for block in net.blocks]
    known = {id(p) for some in inside for p in some}
    rest = [p for p in net.parameters() if id(p) not in known]
    return [_group(job, some) for some in inside], _group(job, rest)


def _group(job: Job, parameters: Sequence[nn.Parameter]) -> Buffers:
    size = job.engine.precision.dtype.itemsize
    numbers = job.over * sum(cut(job, p.shape) for p in parameters)
    trained = job.over * sum(cut(job, p.shape) for p in parameters if p.requires_grad)
    narrow = isinstance(job.engine, FSDP2 | ZeRO3) and job.engine.bf16_reduce
    reduced = 2 if narrow else 4
    if isinstance(job.engine, ZeRO3):
        return Buffers(gathered=numbers * size, sent=min(trained, AT_ONCE) * 2 * reduced)
    if isinstance(job.engine, Single):
        most = max((p.numel() for p in parameters if p.requires_grad), default=0)
        return Buffers(updated=min(most, pieces.AT_ONCE) * pieces.WORKING)
    alone = job.over == 1
    away = isinstance(job.engine, FSDP2) and job.engine.offload
    return Buffers(
        gathered=numbers * size,
        flat=0 if alone else numbers * size,
        sent=trained * reduced,
        summed=trained * reduced if job.gloo and not alone else 0,
        shard=0 if away else trained * 4 / job.over,
    )


def peaks(job: Job) -> Peaks:
    """Find the most that a micro-step takes beside the state.

    Qwen-Image's blocks are alike but for the first and the last few: these say what all take.
    """
    unit = max(1, job.engine.recompute)
    if isinstance(job.model, QwenImage) and job.model.layers > 5 * unit:
        few, more = (peaks(replace(job, model=replace(job.model, layers=n * unit))) for n in (4, 5))
        return few.deeper(more, job.model.layers / unit - 4)
    assemblies = job.assemblies()
    for one in assemblies:
        one.net.to(job.engine.precision.dtype)
        if job.engine.recompute and one.trained:
            every, keep = job.engine.recompute, job.engine.keep_products
            again = recompute_every(every, len(one.net.blocks), keep_products=keep)
            one.net.recompute(lambda block, *inputs, again=again: again(fused(block), *inputs))
    networks: dict[str, Velocity] = {}
    for one in assemblies:
        networks |= one.networks
    student = networks["model"]
    teacher = networks.get("frozen") or networks.get("average") or student
    deal, micro = job.deal, _hungriest(job)
    latent = (job.model.channels, *job.latent)
    draws = job.objective.draw(deal, micro, seed=job.seed, step=0, latent=latent)
    engine, nets = job.engine, {id(one.net): one.net for one in assemblies}
    owner = {id(one.net): one for one in assemblies}
    return trace(
        job.objective,
        nets,
        student,
        teacher,
        _batch(job),
        draws.to("meta"),
        buffers=lambda net: buffers(job, net),
        free=lambda net: not isinstance(engine, FSDP2) or engine.frees(owner[id(net)]),
    )


def _hungriest(job: Job) -> int:
    """Find the micro-step with the most passes."""
    table = job.objective.table(job.batch, seed=job.seed, step=0)

    def passes(micro: int) -> int:
        return sum(int(need[job.deal.mine(micro)].sum()) for need in table.needs.values())

    return max(range(job.deal.micro_steps), key=passes)


def _batch(job: Job) -> Batch:
    """Make a micro-batch without numbers."""
    data, _, _, cond = inputs(job.model, job.micro_batch, job.latent, job.text)
    cond = replace(cond, references=tuple(data for _ in range(job.references)))
    return Batch(data=data, cond=cond, null=cond[:1], keys=("",) * job.micro_batch)
