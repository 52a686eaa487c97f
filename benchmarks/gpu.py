"""What a GPU does with the network and the step at full width: speed, gains, latency, memory.

`python -m benchmarks.gpu` measures at Qwen-Image's width and reduced depth, section by section
(each takes less than nine minutes on a Hopper GPU), and writes each into one JSON when it ends;
`--sections step single` measures those alone. `--toy` is the same at toy size, for a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ablation import machine
from twinflow_train import dist
from twinflow_train.batch import Batch, Condition, Velocity
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine, Sharded
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW, AdamW8bit, Optim
from twinflow_train.engines.single import Single
from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import Sampler, sample
from twinflow_train.models import attention
from twinflow_train.models.adapter import NoAdapter
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.planner import rows_by_pass
from twinflow_train.planner.flops import Work, work
from twinflow_train.planner.gpus import named
from twinflow_train.planner.memory import Job, latent_side, memory

RESULTS = Path(__file__).parent / "results" / "gpu.json"
GIB = 2**30
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes to measure at.

    model: at reduced depth; layers: of the whole network. pixels: sides of images, and the rows of
    a micro-batch for each. text: tokens. rounds: of every measurement, after as many that do not
    count. compiler: for blocks; none at toy size, where compiling would take most of the time.
    """

    model: QwenImage
    layers: int
    pixels: Mapping[int, int]
    text: int
    rounds: int
    compiler: str | None

    @property
    def compilers(self) -> list[str | None]:
        """Without, and with."""
        return [*dict.fromkeys((None, self.compiler))]


FULL = Setup(
    model=QwenImage(layers=4),
    layers=60,
    pixels={512: 4, 1024: 1},
    text=256,
    rounds=5,
    compiler="inductor",
)
TOY = Setup(
    model=QwenImage(layers=1, heads=2, head_dim=32, text_width=64, rope=[16, 8, 8]),
    layers=2,
    pixels={64: 1},
    text=8,
    rounds=1,
    compiler=None,
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A setup on the present device. peak: operations a second that its maker names, if known."""

    setup: Setup
    world: World
    peak: float | None

    def seconds(self, call: Callable[[], object], *, times: int = 1) -> float:
        """Return the median seconds of a call, waiting for the device after some of them."""
        found = []
        for _ in range(2 * self.setup.rounds):
            self.wait()
            began = time.perf_counter()
            for _ in range(times):
                call()
            self.wait()
            found.append((time.perf_counter() - began) / times)
        return median(found[self.setup.rounds :])

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(self, operations: float, seconds: float) -> dict[str, float]:
        """Give seconds, and operations a second: absolute, and of the peak."""
        found = {"seconds": seconds, "tflops": operations / seconds / 1e12}
        return found | ({"mfu": operations / seconds / self.peak} if self.peak else {})

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw numbers on the device."""
        return torch.randn(shape, device=self.world.device, dtype=dtype)


def work_of(model: QwenImage) -> Work:
    """Count a network's operations."""
    (one,) = NoAdapter().assemble(model, [])
    return work(model, one.net)


@contextmanager
def emptied(bench: Bench) -> Iterator[None]:
    """Give back what a measurement has taken, also of the compiler."""
    try:
        yield
    finally:
        gc.collect()
        torch.compiler.reset()
        if bench.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# Sections


def limit(bench: Bench) -> Rows:
    """Products and attention alone, at the network's shapes: what its kernels can reach."""
    model, found = bench.setup.model, Rows()
    width, half = model.heads * model.head_dim, torch.bfloat16
    for pixels, rows in bench.setup.pixels.items():
        tokens = rows * (latent_side(model, pixels) // model.patch) ** 2
        for out in (width, 4 * width):
            x, weight = bench.draw(tokens, width, dtype=half), bench.draw(out, width, dtype=half)
            spent = bench.seconds(partial(torch.mm, x, weight.T), times=20)
            told = bench.rate(2.0 * tokens * width * out, spent)
            found.append({"what": f"product {tokens}x{width}x{out}", **told})
        joint = tokens // rows + bench.setup.text
        shape = (rows, model.heads, joint, model.head_dim)
        q, k, v = (bench.draw(*shape, dtype=half) for _ in range(3))
        spent = bench.seconds(partial(scaled_dot_product_attention, q, k, v), times=20)
        told = bench.rate(4.0 * rows * joint**2 * width, spent)
        found.append({"what": f"attention {rows}x{joint}", **told})
    return found


def passes(bench: Bench) -> Rows:
    """Forward, and forward and backward, of the network."""
    found, counted = Rows(), work_of(bench.setup.model)
    for compiler in bench.setup.compilers:
        engine = FSDP2(recompute=0, reshard=False, compile=compiler)
        with emptied(bench):
            sharded = shard(bench, engine, AdamW(), TwinFlow(teacher_decay=0.0))
            for pixels, rows in bench.setup.pixels.items():
                batch = batch_of(bench, pixels, rows)
                image = image_tokens(bench, pixels)
                asked = ask(sharded.student, batch)
                with torch.no_grad():
                    spent = bench.seconds(asked)
                once = rows * counted.passed(image, bench.setup.text)
                about = {"pixels": pixels, "rows": rows, "compile": compiler}
                found.append({"what": "forward", **about, **bench.rate(once, spent)})
                spent = bench.seconds(partial(learn, sharded, asked))
                both = rows * counted.learned(image, bench.setup.text)
                found.append({"what": "forward, backward", **about, **bench.rate(both, spent)})
            del sharded
    return found


def step(bench: Bench) -> Rows:
    """The whole TwinFlow step, with the averaged teacher and the update."""
    found = Rows()
    for compiler in bench.setup.compilers:
        for pixels in bench.setup.pixels:
            engine = FSDP2(recompute=1, reshard=False, compile=compiler)
            told = whole_step(bench, engine, pixels)
            found.append({"what": "step", "pixels": pixels, "compile": compiler, **told})
    return found


def gains(bench: Bench) -> Rows:
    """The step without one of its savings after the other."""
    pixels, compiler = min(bench.setup.pixels), bench.setup.compiler
    usual = FSDP2(recompute=1, reshard=False, compile=compiler)
    variants: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(whole_step, bench, engine, pixels)
        for name, engine in {
            "all": usual,
            "without compile": replace(usual, compile=None),
            "without keeping networks gathered": replace(usual, reshard=True),
            "without either, and no prefetch": replace(
                usual, reshard=True, compile=None, prefetch=0
            ),
            "with nothing recomputed": replace(usual, recompute=0),
            "without compile, with products kept": replace(usual, compile=None, keep_products=True),
            "with gradients reduced in bfloat16": replace(usual, bf16_reduce=True),
        }.items()
    }

    def mask() -> dict[str, Any]:
        with masked():
            return whole_step(bench, usual, pixels)

    variants["with masks instead of sequences"] = mask
    return [{"what": name, "pixels": pixels, **call()} for name, call in variants.items()]


def fp8(bench: Bench) -> Rows:
    """The step with products of blocks in 8 bits, by torchao; of the peak of 16-bit products."""
    found = Rows()
    for pixels in bench.setup.pixels:
        engine = FSDP2(recompute=1, reshard=False, compile=bench.setup.compiler, fp8=True)
        try:
            told = whole_step(bench, engine, pixels)
        except UserError as error:  # torchao is not there
            told = {"failed": str(error)}
        found.append({"what": "step, fp8", "pixels": pixels, **told})
    return found


def latency(bench: Bench) -> Rows:
    """One image in 1, 2 and 4 evaluations, without the decoder; the whole depth by two depths."""
    found = Rows()
    depths = (bench.setup.model.layers, 2 * bench.setup.model.layers)
    spent: dict[tuple[int, int, int], float] = {}
    for layers in depths:
        engine = FSDP2(recompute=0, reshard=False)
        deep = replace(bench, setup=replace(bench.setup, model=deeper(bench, layers)))
        with emptied(bench):
            sharded = shard(deep, engine, AdamW(), TwinFlow(teacher_decay=0.0))
            for pixels in bench.setup.pixels:
                batch = batch_of(deep, pixels, 1)
                for steps in (1, 2, 4):
                    draw = sampling(sharded.student, batch, Sampler(steps=steps))
                    spent[layers, pixels, steps] = bench.seconds(draw)
            del sharded
    for pixels in bench.setup.pixels:
        for steps in (1, 2, 4):
            few, many = (spent[layers, pixels, steps] for layers in depths)
            each = (many - few) / (depths[1] - depths[0])
            whole = few + each * (bench.setup.layers - depths[0])
            told = {"seconds": whole, "seconds a layer": each}
            found.append({"what": f"{steps} NFE", "pixels": pixels, **told})
    return found


def single(bench: Bench) -> Rows:
    """All of the network trained on this one GPU (`engine=single`), at full depth."""
    pixels = min(bench.setup.pixels)
    deep = replace(bench, setup=replace(bench.setup, model=deeper(bench, bench.setup.layers)))
    optim = AdamW8bit() if bench.world.device.type == "cuda" else AdamW()
    objective = TwinFlow(teacher_decay=0.0)
    told = whole_step(deep, Single(), pixels, optim=optim, objective=objective)
    return [{"what": f"{bench.setup.layers} layers", "pixels": pixels, **told}]


def planned(bench: Bench) -> Rows:
    """The most memory that a step takes, beside what the planner says."""
    found = Rows()
    for recompute in (1, 0):
        for pixels, rows in bench.setup.pixels.items():
            engine = FSDP2(recompute=recompute)
            told = whole_step(bench, engine, pixels)
            side = latent_side(bench.setup.model, pixels)
            job = Job(
                model=bench.setup.model,
                adapter=NoAdapter(),
                objective=TwinFlow(),
                engine=engine,
                optim=AdamW(),
                average=Averages(),
                batch=4 * rows,
                micro_batch=rows,
                ranks=1,
                seed=0,
                latent=(side, side),
                text=bench.setup.text,
            )
            wanted = memory(job).peak / GIB
            about = {"pixels": pixels, "recompute": recompute, "planned_gib": wanted}
            found.append({"what": "memory", **about, **told})
    return found


SECTIONS: Mapping[str, Callable[[Bench], Rows]] = {
    "limit": limit,
    "passes": passes,
    "step": step,
    "gains": gains,
    "fp8": fp8,
    "latency": latency,
    "single": single,
    "memory": planned,
}


# What they share


def deeper(bench: Bench, layers: int) -> QwenImage:
    """Give the network with another depth."""
    return replace(bench.setup.model, layers=layers)


def image_tokens(bench: Bench, pixels: int) -> int:
    """Count the tokens of an image."""
    model = bench.setup.model
    return (latent_side(model, pixels) // model.patch) ** 2


def batch_of(bench: Bench, pixels: int, rows: int) -> Batch:
    """Draw a micro-batch on the device, its texts of two lengths where it has several rows."""
    model, text = bench.setup.model, bench.setup.text
    side = latent_side(model, pixels)
    lengths = [text - (n % 2) * (text // 4) for n in range(rows)]
    texts = [torch.randn(n, model.text_width) for n in lengths]
    null = Condition.pad([torch.randn(text // 8, model.text_width)])
    data = torch.randn(rows, model.channels, side, side)
    whole = Batch(data=data, cond=Condition.pad(texts), null=null, keys=("",) * rows)
    return whole.to(bench.world.device)


def ask(network: Velocity, batch: Batch) -> Callable[[], Tensor]:
    """Ask a network halfway between noise and data."""
    t = batch.data.new_full((len(batch),), 0.5)
    return lambda: network(batch.data, t, t, batch.cond)


def learn(sharded: Sharded, asked: Callable[[], Tensor]) -> None:
    """Take a gradient."""
    sharded.backward(asked().square().mean(), last=True)
    sharded.discard()


def sampling(network: Velocity, batch: Batch, sampler: Sampler) -> Callable[[], Tensor]:
    """Draw an image."""
    return lambda: sample(network, batch.data, batch.cond, sampler)


def shard(bench: Bench, engine: Engine, optim: Optim, objective: TwinFlow) -> Sharded:
    """Build the networks with random weights."""
    model = bench.setup.model
    return engine.shard(
        model,
        model.random_weights(0),
        adapter=NoAdapter(),
        optim=optim,
        decay=objective.teacher_decay,
        average=Averages(),
        world=bench.world,
    )


def whole_step(
    bench: Bench,
    engine: Engine,
    pixels: int,
    *,
    optim: Optim | None = None,
    objective: TwinFlow | None = None,
) -> dict[str, Any]:
    """Take steps of four micro-batches, or of one if the engine does not accumulate."""
    objective, model = objective or TwinFlow(), bench.setup.model
    rows = bench.setup.pixels[pixels]
    micro_batch = 4 * rows if isinstance(engine, Single) else rows
    deal = Deal(batch=4 * rows, micro_batch=micro_batch, ranks=1, rank=0)
    batch, side = batch_of(bench, pixels, micro_batch), latent_side(model, pixels)
    latent, device = (model.channels, side, side), bench.world.device
    drawn = [
        objective.draw(deal, n, seed=0, step=0, latent=latent).to(device)
        for n in range(deal.micro_steps)
    ]
    with emptied(bench):
        sharded = shard(bench, engine, optim or AdamW(), objective)

        def call() -> None:
            sharded.begin(1e-6)
            for n, draws in enumerate(drawn, start=1):
                loss = objective.loss(sharded.student, sharded.teacher, batch, draws)
                sharded.backward(loss.total, last=n == len(drawn))
            sharded.step(1e-6)

        spent = bench.seconds(call)
        peak = bench.world.peak_memory() / GIB
        del sharded
    rows_of = rows_by_pass(objective, deal, seed=0)
    wanted = work_of(model).step(rows_of, image_tokens(bench, pixels), bench.setup.text)
    told = bench.rate(sum(wanted.values()), spent)
    return {**told, "seconds a sample": spent / deal.batch, "peak_gib": peak}


@contextmanager
def masked() -> Iterator[None]:
    """Let attention use masks, as it does where there are no sequences of unequal lengths."""
    kept, attention.HALF = attention.HALF, frozenset[torch.dtype]()
    try:
        yield
    finally:
        attention.HALF = kept


def table(found: Mapping[str, Any]) -> str:
    """Lay out all sections as Markdown."""
    lines = []
    for name, section in found.items():
        about, rows = section["about"], section["rows"]
        device = about["gpu"] or about["hardware"]
        lines += [f"\n{name}: {device}, torch {about['torch']}, {about['date']}\n"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = (row.get(key, "") for key in columns)
            told = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
            lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write each section when it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--toy", action="store_true", help="at toy size, for a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    given = parser.parse_args(arguments)
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    with dist.start() as world:
        cuda = world.device.type == "cuda"
        if not cuda and not given.toy:
            parser.error("there is no GPU here; --toy measures at toy size")
        gpu = torch.cuda.get_device_name(world.device) if cuda else None
        known = named(gpu) if gpu else None
        setup = TOY if given.toy else FULL
        bench = Bench(setup=setup, world=world, peak=known.flops if known else None)
        for name in given.sections:
            began = time.perf_counter()
            rows = SECTIONS[name](bench)
            about = {**machine(), "gpu": gpu, "toy": given.toy}
            about |= {"minutes": (time.perf_counter() - began) / 60}
            found[name] = {"about": about, "rows": rows}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(table({name: found[name]}), flush=True)


if __name__ == "__main__":
    main()
