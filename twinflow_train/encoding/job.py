"""A worker's whole story: agree on settings and plan, make shards, and finish what is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from tqdm import tqdm

from twinflow_train.data.manifest import NULL, Manifest
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_null
from twinflow_train.encoding.assembling import assemble, has_null
from twinflow_train.encoding.making import Maker
from twinflow_train.encoding.plan import PLAN, Plan, Skipped, make_plan
from twinflow_train.encoding.records import Made, alone, finished, publish
from twinflow_train.encoding.settings import SETTINGS, Preparation, settle
from twinflow_train.encoding.sources import Reader
from twinflow_train.encoding.splitting import Wanted, parts
from twinflow_train.encoding.verifying import Verified, verify
from twinflow_train.encoding.workers import Worker
from twinflow_train.errors import UserError
from twinflow_train.models.codec import Codec, PipelineFolder


@dataclass(kw_only=True)
class Outcome:
    """What a worker did, and what the set is now.

    seconds: spent on making. left: shards that have no record yet. manifest, skipped, verified: of
    the whole set, once nothing is left.
    """

    shards: int = 0
    samples: int = 0
    seconds: float = 0.0
    left: int = 0
    manifest: Manifest | None = None
    skipped: Sequence[Skipped] = ()
    verified: Verified | None = field(default=None)


@dataclass
class Tools:
    """What the sets of a preparation are made with; opened when it is needed, and once."""

    settings: Preparation
    worker: Worker

    @cached_property
    def encoders(self) -> PipelineFolder:
        """Where the encoders are."""
        return self.settings.encoders.find()

    @cached_property
    def codec(self) -> Codec:
        """The encoders."""
        return self.settings.encoders.open(self.encoders, self.worker.device)

    @cached_property
    def reader(self) -> Reader:
        """The source."""
        return self.settings.source.open()


def jobs(settings: Preparation, worker: Worker) -> list[Job]:
    """Return a worker's jobs, one for each set that is made."""
    tools = Tools(settings, worker)
    return [Job(part.settings, worker, part.wanted, tools) for part in parts(settings)]


@dataclass
class Job:
    """One worker's part in making a set. wanted: tells of the source's items which go into it."""

    settings: Preparation
    worker: Worker
    wanted: Wanted
    tools: Tools

    def run(self) -> Outcome:
        """Do this worker's part; UserError for what the user can mend."""
        settings, keeping = self.settings, self.settings.keeping
        try:
            keeping.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"folder: {keeping} cannot be made ({error.strerror})") from error
        self._agree_on_a_plan()
        plan = Plan.read(keeping)
        mine = [n for n in self.worker.share(len(plan)) if not finished(settings, n)]
        outcome = self._make(plan, mine)
        outcome.left = sum(not finished(settings, n) for n in range(len(plan)))
        if not outcome.left:
            self._write_null(plan)
            outcome.manifest, outcome.skipped = assemble(settings, self.tools.encoders, len(plan))
            if settings.verify and (mine or not self.worker.number):
                outcome.verified = self._verify(plan)
        return outcome

    def _agree_on_a_plan(self) -> None:
        """Make the plan, or find that it was begun with these settings; UserError if it was not."""
        keeping = self.settings.keeping
        identity = self.settings.identity(self.tools.encoders.revision, device=self.worker.device)
        agree = partial(settle, keeping, identity)
        # What fails before there is a plan does not bind the folder to its settings.
        if (keeping / SETTINGS).exists() or (keeping / PLAN).exists():
            agree()
        if not (keeping / PLAN).exists():
            self._plan(agree)

    def _plan(self, agree: Callable[[], None]) -> None:
        make_plan(
            self.settings.keeping,
            self.tools.reader,
            self.settings.images,
            wanted=self.wanted,
            agree=agree,
            multiple=self.tools.codec.multiple,
            samples_per_shard=self.settings.samples_per_shard,
            loaders=self.settings.loaders,
            show=self.worker.speaks,
        )

    def _make(self, plan: Plan, mine: Sequence[int]) -> Outcome:
        """Make this worker's shards."""
        if not mine:
            return Outcome()
        self._write_null(plan)
        latents = self.settings.images.open(
            self.tools.codec, self.settings.model, self.worker.device
        )
        total = sum(len(plan.task(number).items) for number in mine)
        began = time.perf_counter()
        with (
            ThreadPoolExecutor(self.settings.loaders) as pool,
            tqdm(
                total=total,
                desc=f"encoding, worker {self.worker.number + 1} of {self.worker.count}",
                unit="sample",
                disable=not self.worker.speaks,
                dynamic_ncols=True,
            ) as bar,
        ):
            maker = Maker(
                settings=self.settings,
                reader=self.tools.reader,
                codec=self.tools.codec,
                latents=latents,
                pool=pool,
                done=bar.update,
            )
            counts = self._published(self._made(maker, plan, mine))
        return Outcome(shards=len(counts), samples=sum(counts), seconds=time.perf_counter() - began)

    def _made(self, maker: Maker, plan: Plan, mine: Sequence[int]) -> Iterator[Made]:
        """Make shards, but for those that another worker has put on record since."""
        for number in mine:
            if not finished(self.settings, number):
                yield maker.make(plan.task(number))

    def _published(self, made: Iterator[Made]) -> list[int]:
        """Write each shard while the next is made; count the samples of each that was."""
        written: list[Future[int | None]] = []
        with ThreadPoolExecutor(1, "write") as writer:
            for one in made:
                if written:
                    written[-1].result()
                written.append(writer.submit(publish, one, self.settings))
                del one  # or it would stay in memory while the next but one is made
        return [samples for each in written if (samples := each.result()) is not None]

    def _write_null(self, plan: Plan) -> None:
        """Write the null prompt's embedding, if no other worker has, and if it is damaged."""
        folder = Path(self.settings.folder)
        if not has_null(folder):
            null = self.tools.codec.embed([self.tools.codec.null_prompt], at_once=1)[0]
            with alone(self.settings.keeping, len(plan), writing=folder / NULL):
                if not has_null(folder):
                    write_null(folder, null.to("cpu", self.settings.texts.dtype))

    def _verify(self, plan: Plan) -> Verified:
        return verify(
            ShardSet(self.settings.folder, option="folder"),
            plan,
            reader=self.tools.reader,
            codec=self.tools.codec,
            images=self.settings.images,
            path=Path(self.settings.folder) / "verify.png",
        )
