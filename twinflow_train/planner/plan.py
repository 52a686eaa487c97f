"""A whole plan: memory against what a GPU has, operations, traffic, time, money, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from twinflow_train.engines.average import Averages
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW, AdamW8bit
from twinflow_train.engines.single import Single
from twinflow_train.engines.zero3 import ZeRO3
from twinflow_train.planner.flops import work
from twinflow_train.planner.gpus import GIB, GPU
from twinflow_train.planner.memory import Job, Memory, memory
from twinflow_train.planner.rows import cost, rows_by_pass

CONTEXT = 2.0 * GIB
"""What the driver, its libraries and the buffers of collectives take of a GPU."""
FRAGMENTS = 0.05
"""Share of what tensors take that an allocator cannot use for others of another size."""
USE = (0.25, 0.45)
"""Shares of the most operations a second that training of such networks reached, low and high."""

ONE_GPU = (
    "engine=single optim=adamw8bit objective.teacher_decay=0 average.slow=0 'micro_batch=${batch}'"
)
"""Words for updating inside of the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job comes to on GPUs of one kind, of which `per_node` share a node.

    operations: of one rank's step by pass, in FLOP; again: computed a second time. sent: bytes that
    a rank sends in a step. seconds: of a step, least and most.
    """

    job: Job
    gpu: GPU
    memory: Memory
    operations: dict[str, float]
    again: float
    sent: float
    seconds: tuple[float, float]

    @property
    def needed(self) -> float:
        """Bytes needed of a GPU, with what is lost."""
        return needed(self.memory)

    @property
    def fits(self) -> bool:
        """Whether a GPU has as much."""
        return self.needed <= self.gpu.memory

    @property
    def use(self) -> tuple[float, float]:
        """The share of the GPU's operations a second that is used, least and most."""
        once = sum(self.operations.values()) / self.gpu.flops
        return once / self.seconds[1], once / self.seconds[0]


def needed(found: Memory) -> float:
    """Add to the most that tensors take what is lost besides."""
    return found.peak * (1 + FRAGMENTS) + CONTEXT


def unfit(job: Job, total: float) -> str:
    """Say why a job does not fit GPUs of `total` bytes, and what would make it; empty if it fits.

    Up to the fragmentation that is reckoned with, the doubt is in the job's favour.
    """
    found = memory(job)
    if found.peak + CONTEXT <= total:
        return ""
    return refusal(needed(found), total, remedies(job, total))


def refusal(wanted: float, total: float, remedies: Sequence[str]) -> str:
    """Say that a job does not fit and what would."""
    what = f"the run needs {wanted / GIB:.1f} GiB a GPU, which has {total / GIB:.1f} GiB"
    if not remedies:
        return f"{what}; no setting makes it fit: take more GPUs, or larger ones"
    return f"{what}; this would fit: {' | '.join(remedies)}"


def plan(job: Job, gpu: GPU, *, per_node: int) -> Plan:
    """Reckon what a job needs and how long its steps take.

    Time lies between full overlap of computing and sending at the higher use, and none at the
    lower one.
    """
    (one, *_) = job.assemblies()
    found = work(job.model, one.net)
    image = (1 + job.references) * job.latent[0] * job.latent[1] // job.model.patch**2
    rows = rows_by_pass(job.objective, job.deal, seed=job.seed)
    operations = found.step(rows, image, job.text)
    every = 0 if job.engine.keep_products else job.engine.recompute
    again = rows["student"] * found.recomputed(image, job.text, every=every)
    sent = traffic(job)
    speed = gpu.link if job.ranks <= per_node or job.over <= per_node else gpu.network
    computing = [(sum(operations.values()) + again) / gpu.flops / use for use in USE]
    moving = sent / speed
    return Plan(
        job=job,
        gpu=gpu,
        memory=memory(job),
        operations=operations,
        again=again,
        sent=sent,
        seconds=(max(computing[1], moving), computing[0] + moving),
    )


def traffic(job: Job) -> float:
    """Count the bytes that a rank sends in a step: gathers of every call, gradients' sums."""
    if job.ranks == 1:
        return 0.0
    assemblies = job.assemblies()
    size = job.engine.precision.dtype.itemsize
    whole = size * max(sum(p.numel() for p in one.net.parameters()) for one in assemblies)
    trained = sum(
        p.numel() for kind, _, p in assemblies[0].tensors() if kind == "model" and p.requires_grad
    )
    narrow = isinstance(job.engine, FSDP2 | ZeRO3) and job.engine.bf16_reduce
    gradient = trained * (2 if narrow else 4)
    micro_steps, spent = job.deal.micro_steps, cost(job.objective, job.deal, seed=job.seed)
    gathers = spent.calls + micro_steps  # the gradient gathers once more
    if isinstance(job.engine, FSDP2):
        if not job.engine.reshard:
            gathers = len(assemblies) + 2 * micro_steps - 1
        elif job.engine.keep_teacher and spent.followed and len(assemblies) > 1:
            gathers += 1 - spent.followed
    over, share = job.over, (job.over - 1) / job.over
    copies = job.ranks // over
    across = 2 * (copies - 1) / copies * gradient / over
    return share * (gathers * whole + micro_steps * gradient) + across


Change = tuple[str, Callable[[Job], Job | None]]


def changes() -> Iterator[Change]:
    """Name the changes that take memory off a GPU, those that cost least first."""

    def engine(**some: object) -> Callable[[Job], Job | None]:
        def change(job: Job) -> Job | None:
            if any(name not in vars(job.engine) for name in some):
                return None
            if job.engine.keep_products and some.get("recompute") == 0:
                return None
            changed = replace(job.engine, **some)  # type: ignore[arg-type]
            return None if changed == job.engine else replace(job, engine=changed)

        return change

    def average(**some: bool) -> Callable[[Job], Job | None]:
        def change(job: Job) -> Job | None:
            if not job.average.decays(job.objective.teacher_decay):
                return None
            if job.adapter.partial and some.get("offload"):
                return None
            changed = replace(job.average, **some)
            return None if changed == job.average else replace(job, average=changed)

        return change

    def smaller(job: Job) -> Job | None:
        whole = isinstance(job.engine, Single)  # its batch is one micro-batch
        return replace(job, micro_batch=1) if job.micro_batch > 1 and not whole else None

    def low_bits(job: Job) -> Job | None:
        if type(job.optim) is not AdamW or isinstance(job.engine, ZeRO3):
            return None
        return replace(job, optim=AdamW8bit(**vars(job.optim)))

    def own_teacher(job: Job) -> Job | None:
        if not 0 < job.objective.teacher_decay < 1:
            return None
        return replace(job, objective=replace(job.objective, teacher_decay=0.0))

    yield "engine.keep_teacher=false", engine(keep_teacher=False)
    yield "engine.reshard=true", engine(reshard=True)
    yield "engine.recompute=1 engine.keep_products=false", engine(recompute=1, keep_products=False)
    yield "micro_batch=1", smaller
    yield "engine.shard_over=0", engine(shard_over=0)
    yield "average.bf16=true", average(bf16=True)
    yield "optim=adamw8bit", low_bits
    yield "average.offload=true", average(offload=True)
    yield "objective.teacher_decay=0", own_teacher
    yield "engine.offload=true", engine(offload=True)
    yield "engine.offload_optimizer=true", engine(offload_optimizer=True)
    yield "engine.offload_weights=true", engine(offload_weights=True)


def alternatives(job: Job) -> Iterator[tuple[str, Job]]:
    """Name other ways to train all of a network on one GPU (docs/engines.md), the nearest first."""
    if isinstance(job.engine, Single):
        shares = [share for _, share in job.objective.shares.items() if share]
        batch = job.batch // 2
        while batch * min(shares) >= sum(shares):
            yield f"batch={batch} micro_batch={batch}", replace(job, batch=batch, micro_batch=batch)
            batch //= 2
        return
    alone = job.ranks == 1 and not job.adapter.partial
    if alone and job.objective.teacher_decay < 1 and isinstance(job.optim, AdamW | AdamW8bit):
        changed = replace(
            job,
            engine=Single(precision=job.engine.precision),
            optim=AdamW8bit(**vars(job.optim)),
            objective=replace(job.objective, teacher_decay=0.0),
            average=Averages(),
            micro_batch=job.batch,
        )
        yield ONE_GPU, changed


def remedies(job: Job, total: float) -> list[str]:
    """Find what makes a job fit: each change that does alone, or else all up to the first that do.

    Empty if nothing here does: take more GPUs, or larger ones.
    """

    def fits(changed: Job) -> bool:
        return needed(memory(changed)) <= total

    alone = []
    for words, change in changes():
        changed = change(job)
        if changed is not None and fits(changed):
            alone.append(words)
    alone += [words for words, changed in alternatives(job) if fits(changed)][:1]
    if alone:
        return alone
    together: list[str] = []
    for words, change in changes():
        changed = change(job)
        if changed is None:
            continue
        job = changed
        together.append(words)
        if fits(job):
            return [" ".join(together)]
    return []
