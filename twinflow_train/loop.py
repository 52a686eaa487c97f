"""The whole story of a run, top to bottom."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twinflow_train import dist
from twinflow_train.batch import Batch, moved
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.data.feed import Feed
from twinflow_train.data.loader import prefetch
from twinflow_train.dist import World
from twinflow_train.draws import Draws
from twinflow_train.engines.base import Sharded
from twinflow_train.evals.during import Found, evaluate
from twinflow_train.faults import Safeguards, safeguards
from twinflow_train.garbage import collecting
from twinflow_train.late import Lap, Later
from twinflow_train.metrics import Log
from twinflow_train.planner.speed import Meter
from twinflow_train.reporting import card
from twinflow_train.reporting.summary import conclude
from twinflow_train.run import INTERRUPTED, Resume, Run
from twinflow_train.runfolder import read_manifest, run_folder, set_aside, write_manifest


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One optimizer step of one rank: its micro-batches and their randomness.

    epochs: how often the data were shown before it, as metrics.
    """

    batches: list[Batch]
    draws: list[Draws]
    epochs: dict[str, float]

    def micro_steps(self, world: World) -> Iterator[tuple[Batch, Draws, bool]]:
        """Yield the micro-batches on the rank's device, and whether each is the last."""
        batches = moved(self.batches, world.device)
        for number, (batch, draws) in enumerate(zip(batches, self.draws, strict=True), start=1):
            yield batch, draws, number == len(self.batches)


def train(run: Run) -> int:
    """Train, save, evaluate and export; return the process's exit code.

    Side effects stand before the step: the first step, the last one and an interruption need no
    code of their own.
    """
    with ExitStack() as stack:
        records, patience = Path(run.folder) / "stacks", run.faults.patience_seconds
        world = stack.enter_context(dist.start(records, patience_seconds=patience))
        run.check(world)
        folder = stack.enter_context(run_folder(run.folder, world))
        engine = run.shard(world)
        progress = Progress()
        saves = stack.enter_context(run.saves(folder, engine, progress, world))
        if run.resume is Resume.never or not saves.resume(must=run.resume is Resume.must):
            set_aside(folder, world)
        write_manifest(folder, run.config(), run.yaml(), run.about(), world)
        log = stack.enter_context(run.log(folder, progress, world))
        meter = run.meter(world)
        log.tell(run.banner(engine, world) + "\n" + saves.banner())
        safe = stack.enter_context(safeguards(run.faults, progress.faults, folder, world))
        trace = stack.enter_context(run.profile.tracer(folder, world))
        garbage = stack.enter_context(collecting())
        feed = stack.enter_context(
            Feed(steps=partial(prepare, run, world), world=world, budget=run.data.skip_budget)
        )
        ahead: Launched | None = None  # the last step, which the device may still be computing
        while True:
            with safe.watchdog.waiting("the others"):
                done, stop = progress.step >= run.steps, dist.stopping(world)
            evaluates = done or not progress.step or progress.every(run.eval_every)
            if not safe.guard.exhausted and (stop or evaluates or progress.every(run.save_every)):
                with safe.watchdog.waiting("the last step"):
                    settle(ahead, safe, saves, log, meter, world)
                    ahead = None
            if safe.guard.exhausted:
                go_back(saves, progress, safe, log)
                ahead = None
                continue
            due = progress.every(run.save_every) and not progress.faults.in_row
            if done or stop or due:
                saves.write()
            if evaluates and not stop:
                found = look(run, engine, progress, log, folder, world)
            if done or stop:
                break
            trace.at(progress.step)
            garbage.at(progress.step)
            lap = Lap(world.device)
            with safe.watchdog.waiting("data"):
                prepared = feed.take(progress.position)
            with safe.watchdog.step():
                launched = learn(run, engine, feed, prepared, lap, progress, safe, world)
                settle(ahead, safe, saves, log, meter, world)
            ahead = launched
            progress.advance(run.batch)
        if stop:
            saves.finish()
            log.tell(f"interrupted after step {progress.step}; start again to continue")
            return INTERRUPTED
        end(run, engine, progress, found, log, folder, world)
        saves.finish()
        return 0


def prepare(run: Run, world: World, step: int) -> Generator[Prepared]:
    """Yield what this rank needs for each step from one on, made ahead."""
    return prefetch(_prepare(run, world, step), run.data.prefetch)


def _prepare(run: Run, world: World, step: int) -> Iterator[Prepared]:
    """Yield this rank's micro-batches with their randomness, an optimizer step at a time."""
    deal, stream = run.deal(world), run.data.stream(seed=run.seed, batch=run.batch)
    groups = [*run.objective.shares.counts(run.batch).values()]
    for batches in run.data.batches(stream, rows=deal.rows(), groups=groups, step=step):
        latent = batches[0].data.shape[1:]
        draws = [
            run.objective.draw(deal, micro, seed=run.seed, step=step, latent=latent)
            for micro in range(deal.micro_steps)
        ]
        if world.device.type == "cuda":
            draws = [each.pinned() for each in draws]
        yield Prepared(batches=batches, draws=draws, epochs=run.data.epochs(stream, step))
        step += 1


@dataclass(frozen=True, kw_only=True)
class Launched:
    """An optimizer step that the device was given, and may still be computing.

    step, samples: taken before it. position: of its data. rows: each micro-batch's losses by row.
    names: of the first of `told`, which are sums over all ranks; then come loss and pace, and at
    the end this step's gradient norm and whether there was an update. known: metrics that need no
    device. lap: its time, waiting for data and all.
    """

    step: int
    samples: int
    position: int
    prepared: Prepared
    rows: list[torch.Tensor]
    names: list[str]
    told: Later
    known: dict[str, float]
    lap: Lap


def learn(
    run: Run,
    engine: Sharded,
    feed: Feed[Prepared],
    prepared: Prepared,
    lap: Lap,
    progress: Progress,
    safe: Safeguards,
    world: World,
) -> Launched:
    """Give the device one optimizer step; wait for nothing that it computes.

    On the device it is decided, too, whether the step is taken: a loss or a gradient that is not
    finite, on any rank, forbids it on all.
    """
    due = run.terms_every and progress.step % run.terms_every == 0
    norms = norms_by_term(run, engine, prepared, world) if due else {}
    rate = run.optim.rate(progress.step, run.steps)
    engine.begin(rate)
    sums: dict[str, torch.Tensor] = {}
    rows = []
    for batch, draws, last in prepared.micro_steps(world):
        loss = run.objective.loss(engine.student, engine.teacher, batch, draws)
        engine.backward(loss.total, last=last)
        rows.append(loss.rows)
        for name, value in loss.metrics.items():
            sums[name] = sums[name] + value if name in sums else value
    shares = world.sum(torch.cat([torch.stack([*sums.values()]), safe.pace.mine(feed.waited)]))
    taken = engine.step(
        rate,
        number=progress.step,
        loss=shares[[*sums].index("loss/total")],
        limits=safe.guard.limits(progress.step),
    )
    lap.end()
    told = Later(shares, taken.norm.to(shares.device), taken.updated.to(shares.device))
    return Launched(
        step=progress.step,
        samples=progress.samples,
        position=progress.position,
        prepared=prepared,
        rows=rows,
        names=[*sums],
        told=told,
        known=feed.figures() | norms | prepared.epochs | {"lr": rate},
        lap=lap,
    )


def settle(
    launched: Launched | None,
    safe: Safeguards,
    saves: Checkpoints,
    log: Log,
    meter: Meter,
    world: World,
) -> None:
    """Wait for a step that the device was given, judge its numbers, and log them. Collective."""
    if launched is None:
        return
    *told, norm, updated = launched.told.read()
    means, paces = dict(zip(launched.names, told, strict=False)), told[len(launched.names) :]
    batches, draws = launched.prepared.batches, launched.prepared.draws
    safe.guard.judge(
        launched.step,
        launched.position,
        loss=means["loss/total"],
        norm=norm,
        updated=bool(updated),
        batches=batches,
        rows=launched.rows,
    )
    seconds = launched.lap.seconds()
    own = max(0.0, seconds - launched.known["time/data"])
    values = (
        means
        | launched.known
        | meter.speed(batches, draws, seconds)
        | saves.figures()
        | safe.guard.figures()
        | safe.pace.figures(paces, seconds=own)
        | {"norm/grad": norm, "time/step": seconds, "memory/peak_gib": world.peak_memory() / 2**30}
    )
    log.stepped(launched.step, launched.samples, values)


def go_back(saves: Checkpoints, progress: Progress, safe: Safeguards, log: Log) -> None:
    """Return to the newest checkpoint from before the skipped steps, and pass their data over.

    What the device was given after the last of them is as if it had not been.

    Raises:
        UserError: there is none, or the run went back too often.
    """
    record, guard = replace(progress.faults), safe.guard
    step, position = guard.judged
    began = step + 1 - record.in_row
    if not guard.may_go_back:
        raise guard.given_up(f"the run has gone back {record.rollbacks} times")
    if not saves.resume(up_to=began):
        raise guard.given_up(f"there is no whole checkpoint up to step {began}")
    progress.faults.went_back(record, passed=position + 1 - progress.step)
    guard.note(progress.step, f"went back here after {record.in_row} skipped steps")
    log.rewind(progress.step)


def look(
    run: Run, engine: Sharded, progress: Progress, log: Log, folder: Path, world: World
) -> Found:
    """Evaluate the present networks, and log what there is to see."""
    found = evaluate(
        run.evals,
        engine.networks(),
        base=engine.base or run.model.pretrained(engine.student),
        health=run.health(engine),
        heldout=run.data.held_out(),
        folder=folder / "samples",
        step=progress.step,
        world=world,
    )
    log.write(progress.step, progress.samples, found.metrics())
    log.picture(progress.step, "samples", found.picture, caption=found.caption)
    return found


def norms_by_term(run: Run, engine: Sharded, prepared: Prepared, world: World) -> dict[str, float]:
    """Return the gradient norm of each term of the loss alone: the passes of one more step each."""
    norms = {}
    for term in run.objective.terms(run.batch):
        for batch, draws, last in prepared.micro_steps(world):
            loss = run.objective.loss(engine.student, engine.teacher, batch, draws)
            engine.backward(loss.terms[term], last=last)
        norms[f"norm/{term}"] = float(engine.discard())
    return norms


def end(
    run: Run,
    engine: Sharded,
    progress: Progress,
    found: Found,
    log: Log,
    folder: Path,
    world: World,
) -> None:
    """Export the weights and say how good they are."""
    summary = found.evaluation.summary() | {"name": run.name, "heldout": found.heldout}
    summary |= {"step": progress.step, "samples": progress.samples}
    export(run, engine, summary, folder, world)
    log.artifact(run.name, folder / "export")
    log.tell(conclude(folder, summary, write=world.main) + "\n" + log.evaluated())


def export(run: Run, engine: Sharded, summary: dict[str, Any], folder: Path, world: World) -> None:
    """Write the weights to use, averaged if there is an average, as diffusers reads them."""
    kind = "average" if "average" in engine.averages else "model"
    weights = engine.whole(kind)
    if world.main:
        run.adapter.save(folder / "export", run.model, weights, dtype=torch.float32)
        card.write(
            folder / "export",
            manifest=read_manifest(folder),
            holds=run.adapter.contents(run.model),
            kind=kind,
            step=summary["step"],
            samples=summary["samples"],
            summary=summary,
        )
    else:
        deque(weights, maxlen=0)  # gathering takes every rank
