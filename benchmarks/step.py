"""A training step of ours beside the published one, and beside plain flow matching, in one run.

`python -m benchmarks.step` takes turns on one machine with the same networks and the same texts: a
tiny Qwen-Image, 256 image tokens, batches of 4, order 2, guidance. The published step is that of
`benchmarks/published.py` over texts that are padded, with a dense mask. The stock step is the class
of diffusers under FSDP2, trained by the usual ten lines; ours is then `objective=flow_matching`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ablation import machine
from benchmarks.published import Published
from twinflow_train import dist
from twinflow_train.batch import Batch, Condition
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Precision
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW
from twinflow_train.models.adapter import NoAdapter
from twinflow_train.models.qwen_image import QwenImage, pack
from twinflow_train.objectives.presets import flow_matching
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.rng import generator

RESULTS = Path(__file__).parent / "results" / "step.json"
TEXTS = {"short": (20, 34, 48, 64), "long": (60, 180, 400, 1024)}
ROWS = {"short": 4, "long": 1, "flow_matching": 4}
"""Samples of our micro-batches, which hold texts of like lengths: the shorter, the more."""
NULL = 20

KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""Environment in which the C library keeps what a step frees for the next one, on both sides."""

Step = Callable[[int], object]


def model(width: int) -> QwenImage:
    """Give a Qwen-Image of two blocks; at real width modulations are a smaller part of it."""
    return QwenImage(
        layers=2, heads=width // 32, head_dim=32, text_width=64, channels=16, rope=[16, 8, 8]
    )


def texts(size: QwenImage, lengths: Sequence[int], step: int) -> list[Tensor]:
    """Draw text embeddings, unpadded."""
    draws = generator("step", "texts", step)
    return [torch.randn(n, size.text_width, generator=draws) for n in lengths]


def micro_batches(
    size: QwenImage, lengths: Sequence[int], rows: int, step: int, side: int
) -> list[Batch]:
    """Give a step's batch in micro-batches of `rows` with texts of like lengths."""
    found, draws = texts(size, sorted(lengths), step), generator("step", "data", step)
    data = torch.randn(len(lengths), size.channels, side, side, generator=draws)
    null = Condition.pad([torch.ones(min(NULL, max(lengths)), size.text_width)])
    return [
        Batch(
            data=data[i : i + rows],
            cond=Condition.pad(found[i : i + rows]),
            null=null,
            keys=("",) * rows,
        )
        for i in range(0, len(lengths), rows)
    ]


def ours(
    size: QwenImage, objective: TwinFlow, lengths: Sequence[int], side: int, world: World, rows: int
) -> Step:
    """Give our step on our engine, in micro-steps of `rows` texts of like lengths.

    lengths: of the texts of all ranks, each of which takes the first of its share.
    """
    optim = AdamW()
    engine = FSDP2(precision=Precision.fp32, recompute=0, reshard=False).shard(
        size,
        size.random_weights(0),
        adapter=NoAdapter(),
        optim=optim,
        decay=objective.teacher_decay,
        average=Averages(),
        world=world,
    )
    deal = Deal(batch=len(lengths), micro_batch=rows, ranks=world.size, rank=world.rank)
    mine = lengths[: len(lengths) // world.size]

    def step(number: int) -> None:
        for micro, batch in enumerate(micro_batches(size, mine, rows, number, side)):
            latent = tuple(batch.data.shape[1:])
            draws = objective.draw(deal, micro, seed=0, step=number, latent=latent)
            loss = objective.loss(engine.student, engine.teacher, batch, draws).total
            engine.backward(loss, last=micro == deal.micro_steps - 1)
        engine.step(optim.lr)

    return step


def published(size: QwenImage, lengths: Sequence[int], side: int, longest: int) -> Step:
    """Give the published step: all rows in all passes, texts padded to `longest`, a dense mask."""
    student, teacher = (built(size) for _ in range(2))
    teacher.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    objective = Published()

    def step(number: int) -> None:
        (batch,) = micro_batches(size, lengths, len(lengths), number, side)
        mask = batch.cond.padded(longest).full_mask()
        batch = replace(
            batch,
            cond=replace(batch.cond.padded(longest), mask=mask),
            null=batch.null.padded(longest),
        )
        latent = tuple(batch.data.shape[1:])
        draws = objective.draw(len(lengths), seed=0, step=number, latent=latent)
        objective.loss(student, teacher, batch, draws).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)

    return step


def built(size: QwenImage) -> nn.Module:
    """Give the network whole, with the weights that all steps start from."""
    (one,) = NoAdapter().assemble(size, [])
    net = one.net.to_empty(device="cpu")
    net.rebuild_constants()
    weights = size.random_weights(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights.read(net.stored_name(name), parameter.shape, 0, len(parameter)))
    return net


def stock(size: QwenImage, lengths: Sequence[int], side: int) -> Step:
    """Give flow matching with diffusers' class under FSDP2, as training scripts write it."""
    from diffusers import QwenImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = QwenImageTransformer2DModel(**size.stock_arguments())
    for block in (*net.transformer_blocks, net):
        fully_shard(block, reshard_after_forward=False)
    trained = list(net.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    tokens = (1, side // size.patch, side // size.patch)

    def step(number: int) -> None:
        (batch,) = micro_batches(size, lengths, len(lengths), number, side)
        draws = generator("step", "stock", number)
        t = torch.rand(len(batch), generator=draws)
        noise = torch.randn(batch.data.shape, generator=draws)
        x_t = t[:, None, None, None] * noise + (1 - t)[:, None, None, None] * batch.data
        velocity = net(
            hidden_states=pack(x_t, size.patch),
            encoder_hidden_states=batch.cond.tokens,
            encoder_hidden_states_mask=batch.cond.mask,
            timestep=t,
            img_shapes=[[tokens]] * len(batch),
            return_dict=False,
        )[0]
        (velocity - pack(noise - batch.data, size.patch)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def operations(step: Step) -> float:
    """Count a step's operations by torch's counter, attention as if written out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        step(0)
    return float(counted.get_total_flops())


def in_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Time steps in turns; give the least CPU-seconds of each, after a turn that does not count.

    The least, because what else runs on the machine only adds: caches are shared.
    """
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(number)
            spent[name].append(time.process_time() - began)
    return {name: min(found[1:]) for name, found in spent.items()}


def compare(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Give the operations and seconds of two steps, and the ratios of the first to the second."""
    flops = {name: operations(step) for name, step in steps.items()}
    seconds = in_turns(steps, rounds)
    first, second = steps
    return {
        "tflop": {name: value / 1e12 for name, value in flops.items()},
        "seconds": seconds,
        "ratio": {
            "operations": flops[first] / flops[second],
            "time": seconds[first] / seconds[second],
        },
    }


def measure(*, width: int, side: int, rounds: int, scale: float = 1.0) -> dict[str, object]:
    """Run all comparisons; `scale` shortens the texts."""
    size, found = model(width), dict[str, object]()
    with dist.start() as world:
        for name, lengths in TEXTS.items():
            these = [max(1, int(n * scale)) for n in lengths]
            found[name] = compare(
                {
                    "ours": ours(size, TwinFlow(), these, side, world, ROWS[name]),
                    "published": published(size, these, side, max(these)),
                },
                rounds,
            )
        these = [max(1, int(n * scale)) for n in TEXTS["short"]]
        plain = replace(flow_matching(), teacher_decay=0.0)  # the stock step has no average either
        found["flow_matching"] = compare(
            {
                "ours": ours(size, plain, these, side, world, ROWS["flow_matching"]),
                "stock": stock(size, these, side),
            },
            rounds,
        )
    return found


def table(found: Mapping[str, object]) -> str:
    """Give the ratios as a Markdown table."""
    rows = ["| | operations | time |", "|---|---:|---:|"]
    for name, value in found.items():
        ratio = value["ratio"]  # type: ignore[index]
        rows.append(f"| {name} | {ratio['operations']:.2f} | {ratio['time']:.2f} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    if not KEEPING.items() <= os.environ.items():
        words = [sys.executable, "-m", "benchmarks.step", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, words, {**os.environ, **KEEPING})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--side", type=int, default=32, help="of latents: 4 of them are a token")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the texts' lengths")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    found = measure(width=given.width, side=given.side, rounds=given.rounds, scale=given.scale)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"about": machine(), **found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
