"""Training a one-step generator of digits from scratch: the published step against ours.

Every method of a seed starts from the same weights, sees the same data in the same order and gets
the same CPU-seconds on one thread, in turns of a few seconds, so that load hits all alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.mnist import CLASSES, Digits, Jury, Scores
from benchmarks.published import Published
from benchmarks.unet import NULL, unet
from twinflow_train.batch import Batch, Condition, Velocity
from twinflow_train.deal import Deal
from twinflow_train.engines.average import decay_at, follow
from twinflow_train.errors import UserError
from twinflow_train.flow.losses import Distance, l2
from twinflow_train.flow.sampler import Sampler, sample
from twinflow_train.objectives import presets
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.rng import generator

BATCH, RATE, LATENT = 64, 1e-3, (1, 16, 16)
PUBLISHED_GUIDANCE, TEACHER = 0.8, 0.99
NULL_SHARE = 0.1  # of all rows: guidance asks for the null class, which has to be learnt
AVERAGE = 0.999  # decay of the weights that are judged beside the raw ones
SLICE_SECONDS = 10.0
PER_CLASS = 100
SAMPLERS = {
    "nfe1": Sampler(steps=1),
    "nfe4": Sampler(steps=4, stochasticity=1.0, end_gap=0.5),
}


class Method(Protocol):
    """A way to train; `teacher_decay` is that of its averaged teacher, 0 for none."""

    teacher_decay: float

    def loss(
        self, student: Velocity, teacher: Velocity, batch: Batch, *, seed: int, step: int
    ) -> Tensor:
        """Draw what is random in a step and compute its loss."""
        ...


@dataclass(kw_only=True)
class Plain:
    """The published step as it is."""

    step: Published
    teacher_decay: float = TEACHER

    def loss(
        self, student: Velocity, teacher: Velocity, batch: Batch, *, seed: int, step: int
    ) -> Tensor:
        """Compute the published loss."""
        draws = self.step.draw(len(batch), seed=seed, step=step, latent=LATENT)
        return self.step.loss(student, teacher, batch, draws)


@dataclass(kw_only=True)
class Ours:
    """An objective of this package, trained as the loop trains it."""

    objective: TwinFlow
    teacher_decay: float = field(init=False)

    def __post_init__(self) -> None:
        self.teacher_decay = self.objective.teacher_decay

    def loss(
        self, student: Velocity, teacher: Velocity, batch: Batch, *, seed: int, step: int
    ) -> Tensor:
        """Compute the objective's loss."""
        deal = Deal(batch=len(batch), micro_batch=len(batch), ranks=1, rank=0)
        draws = self.objective.draw(deal, 0, seed=seed, step=step, latent=LATENT)
        return self.objective.loss(student, teacher, batch, draws).total


def published(distance: Distance, guidance: float = PUBLISHED_GUIDANCE) -> Plain:
    """Return the published step with a distance."""
    return Plain(step=Published(distance=distance, guidance=guidance))


def ours() -> Ours:
    """Return our preset for training from random weights.

    Its guidance, its delta and its share of local rows were chosen by runs on seeds 0 (50 seconds)
    and 7 (400 seconds); the published step has guidance 0.8 and delta 0.01.
    """
    return Ours(objective=presets.twinflow_scratch())


METHODS: dict[str, Callable[[], Method]] = {
    "published barron": lambda: published(Distance()),
    "published l2": lambda: published(l2()),
    "published l2, our guidance": lambda: published(l2(), ours().objective.guidance),
    "ours": ours,
}


class Training:
    """One method's network on its way, advanced by CPU-seconds."""

    def __init__(self, method: Method, digits: Digits, seed: int) -> None:
        self.method = method
        self.digits = digits
        self.seed = seed
        self.student = unet(seed)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher: nn.Module = self.student
        if method.teacher_decay:
            self.teacher = copy.deepcopy(self.average)
        self.optimizer = torch.optim.Adam(self.student.parameters(), RATE)
        self.null = condition(torch.tensor([NULL]))
        self.steps = 0
        self.cpu_seconds = 0.0

    def advance(self, cpu_seconds: float) -> None:
        """Take steps until the training has cost `cpu_seconds` in all."""
        while self.cpu_seconds < cpu_seconds:
            began = time.process_time()
            self._step()
            self.cpu_seconds += time.process_time() - began

    def _step(self) -> None:
        loss = self.method.loss(
            self.student, self.teacher, self.batch(), seed=self.seed, step=self.steps
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        weights = [p.detach() for p in self.student.parameters()]
        if self.teacher is not self.student:
            decay = decay_at(self.method.teacher_decay, self.steps)
            follow(list(self.teacher.parameters()), weights, decay, path=(self.steps,))
        follow(
            list(self.average.parameters()),
            weights,
            decay_at(AVERAGE, self.steps),
            path=(self.steps,),
        )

    def batch(self) -> Batch:
        """Return the data of the coming step, the same for every method."""
        per_epoch = len(self.digits.train) // BATCH
        epoch, place = divmod(self.steps, per_epoch)
        order = torch.randperm(len(self.digits.train), generator=generator("o", self.seed, epoch))
        rows = order[place * BATCH : (place + 1) * BATCH]
        classes = self.digits.train_classes[rows]
        hidden = torch.rand(BATCH, generator=generator("null", self.seed, self.steps)) < NULL_SHARE
        return Batch(
            data=self.digits.train[rows],
            cond=condition(classes.masked_fill(hidden, NULL)),
            null=self.null,
            keys=tuple(map(str, rows.tolist())),
        )


def condition(classes: Tensor) -> Condition:
    """Return classes as the U-Net's condition."""
    return Condition(tokens=classes.float()[:, None, None])


def judged(network: Velocity, jury: Jury) -> dict[str, Scores]:
    """Sample with every sampler, always from the same noise, and judge."""
    classes = torch.arange(CLASSES).repeat(PER_CLASS)
    noise = torch.randn(len(classes), *LATENT, generator=generator("evaluation"))

    def eps(k: int) -> Tensor:
        return torch.randn(noise.shape, generator=generator("evaluation", k))

    return {
        name: jury.scores(sample(network, noise, condition(classes), sampler, eps=eps), classes)
        for name, sampler in SAMPLERS.items()
    }


def one_seed(seed: int, seconds: float, digits: Digits, jury: Jury) -> list[dict[str, Any]]:
    """Train every method in turns and return a row for each."""
    trainings = {name: Training(make(), digits, seed) for name, make in METHODS.items()}
    until = 0.0
    while until < seconds:
        until = min(until + SLICE_SECONDS, seconds)
        for training in trainings.values():
            training.advance(until)
    return [
        {
            "method": name,
            "seed": seed,
            "steps": training.steps,
            "cpu_seconds": round(training.cpu_seconds, 2),
            "raw": {k: asdict(v) for k, v in judged(training.student, jury).items()},
            "average": {k: asdict(v) for k, v in judged(training.average, jury).items()},
        }
        for name, training in trainings.items()
    ]


def started(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results so far; UserError if they were made with other settings."""
    if not out.is_file():
        return {"settings": settings, "rows": []}
    found: dict[str, Any] = json.loads(out.read_text())
    if found["settings"] != settings:
        raise UserError(
            f"{out} was made with other settings, such as {found['settings']['seconds']:g} seconds "
            f"where {settings['seconds']:g} are asked for: move it away or name another with --out"
        )
    return found


def write(out: Path, results: dict[str, Any]) -> None:
    """Write results whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(out)


def machine() -> dict[str, Any]:
    """Describe where and when this runs."""
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(results: dict[str, Any]) -> str:
    """Lay the results out in Markdown: accuracy / Frechet distance, mean over seeds (each seed)."""
    columns = [(w, k) for w in ("raw", "average") for k in SAMPLERS]
    lines = [
        "| method | steps | " + " | ".join(f"{w} {k}" for w, k in columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for name in METHODS:
        rows = [row for row in results["rows"] if row["method"] == name]
        steps = statistics.mean(row["steps"] for row in rows)
        cells = []
        for weights, key in columns:
            each = [row[weights][key] for row in rows]
            accuracies, distances = ([one[k] for one in each] for k in ("accuracy", "frechet"))
            cells.append(f"{spread(accuracies, '.3f')} / {spread(distances, '.1f')}")
        lines.append(f"| {name} | {steps:.0f} | " + " | ".join(cells) + " |")
    real = results["heldout"]
    cells = [f"{real['accuracy']:.3f} / {real['frechet']:.1f}"] * len(columns)
    lines.append("| real held-out digits | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Write the mean, and the least and greatest where there are several."""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=400.0, help="CPU-seconds a method")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("datasets/mnist"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        run(options.data, options.out, seconds=options.seconds, seeds=options.seeds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(data: Path, out: Path, *, seconds: float, seeds: int) -> None:
    """Train the seeds that `out` lacks, writing after each, and print the table."""
    methods = {name: repr(make()) for name, make in METHODS.items()}
    settings = {"seconds": seconds, "batch": BATCH, "rate": RATE, "methods": methods}
    results = started(out, settings)
    digits = Digits.read(data)
    jury = Jury(digits)
    results["heldout"] = asdict(jury.scores(digits.heldout, digits.heldout_classes))
    done = {row["seed"] for row in results["rows"]}
    for seed in sorted(set(range(seeds)) - done):
        results["rows"] += one_seed(seed, seconds, digits, jury)
        results["machine"] = machine()
        write(out, results)
        print(f"seed {seed} is done", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
