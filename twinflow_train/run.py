"""A run as configuration: its parts, how they fit together, and the options of each group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from twinflow_train.checkpoint import Checkpoints, Progress, refuse_unusable
from twinflow_train.data.loader import Shards
from twinflow_train.deal import Deal
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.base import Engine, Sharded
from twinflow_train.engines.optim import AdamW, AdamW8bit, Optim, RAdam
from twinflow_train.engines.options import ENGINES
from twinflow_train.errors import UserError
from twinflow_train.evals.health import Health
from twinflow_train.evals.options import EVALS
from twinflow_train.evals.suite import Evals
from twinflow_train.faults import Faults
from twinflow_train.metrics import Log, NoTracking, Tracking, WandB, open_log
from twinflow_train.models.adapter import Adapter, NoAdapter
from twinflow_train.models.base import Model
from twinflow_train.models.hub import located
from twinflow_train.models.lora import LoRA, fingerprint
from twinflow_train.models.openuni import OpenUni
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.qwen_image_edit import QwenImageEdit
from twinflow_train.models.sana import Sana, sana_600m
from twinflow_train.models.sd3 import SD3
from twinflow_train.models.weights import Weights
from twinflow_train.models.z_image import Convention, ZImage
from twinflow_train.objectives import presets
from twinflow_train.objectives.twinflow import TwinFlow
from twinflow_train.plain import plain
from twinflow_train.planner import cost, gpus, rows_by_pass
from twinflow_train.planner.flops import Work, work
from twinflow_train.planner.settings import Plans
from twinflow_train.planner.speed import Meter
from twinflow_train.planner.start import refuse_unfit
from twinflow_train.profiler import Profile
from twinflow_train.runfolder import about_code
from twinflow_train.scrub import scrub

INTERRUPTED = 75
"""Exit code of a run that was asked to stop and saved: start it again (EX_TEMPFAIL)."""


class Resume(Enum):
    """auto: from the newest checkpoint if there is one; must: refuse without; never: begin anew.

    With never, what an earlier run left in the folder moves to before-N/ inside it.
    """

    auto = "auto"
    must = "must"
    never = "never"


@dataclass(kw_only=True)
class Run:
    """One training run.

    name: of the run; folder: where everything it makes goes. seed: of all randomness.
    steps: optimizer steps; batch: samples of one, over all ranks; micro_batch: samples of one
    forward and backward on one rank. save_every, eval_every, log_every: in steps, 0 is only at
    the end (saving), at the start and the end (evaluating) or never (logging). terms_every: steps
    between measurements of each loss term's own gradient norm, which cost as much as three steps,
    a multiple of log_every; 0 is never. checkpoints: where they go, a folder or a URL such as
    s3://bucket/run, of this run alone; null is FOLDER/checkpoints. keep_last: newest checkpoints to
    keep; keep_every: those at multiples of so many steps stay for ever, 0 is none. init_from: what
    to start from: a diffusers folder, the export of a run, or REPOSITORY or REPOSITORY@REVISION of
    the Hugging Face hub; null starts from random weights.
    adapter: what of the model is trained. average: how averaged networks are held. faults: what the
    run puts up with. profile: which steps are traced. plan: whether it fits.
    """

    name: str = "run"
    folder: str = "outputs/${name}"
    seed: int = 0
    steps: int = MISSING
    batch: int = MISSING
    micro_batch: int = MISSING
    save_every: int = 500
    checkpoints: str | None = None
    keep_last: int = 2
    keep_every: int = 0
    eval_every: int = 500
    log_every: int = 1
    terms_every: int = 0
    resume: Resume = Resume.auto
    init_from: str | None = None
    model: Model = MISSING
    adapter: Adapter = MISSING
    objective: TwinFlow = MISSING
    engine: Engine = MISSING
    optim: Optim = MISSING
    average: Averages = field(default_factory=Averages)
    faults: Faults = field(default_factory=Faults)
    profile: Profile = field(default_factory=Profile)
    plan: Plans = field(default_factory=Plans)
    data: Shards = MISSING
    evals: Evals = MISSING
    tracking: Tracking = MISSING

    def __post_init__(self) -> None:
        for key in ("steps", "batch", "micro_batch"):
            if self.__dict__[key] < 1:
                raise ValueError(f"{key} must be at least 1, got {self.__dict__[key]}")
        for key in ("save_every", "keep_every", "eval_every", "log_every", "terms_every"):
            if self.__dict__[key] < 0:
                raise ValueError(f"{key} must be 0 or more, got {self.__dict__[key]}")
        if self.terms_every and (not self.log_every or self.terms_every % self.log_every):
            raise ValueError(
                f"terms_every = {self.terms_every} must be a multiple of log_every = "
                f"{self.log_every}: what is not logged need not be measured"
            )
        if not self.name or not self.folder:
            raise ValueError("name and folder must not be empty")
        if self.checkpoints is not None and not self.checkpoints.strip():
            raise ValueError("checkpoints must be a folder, a URL or null (FOLDER/checkpoints)")
        if self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {self.keep_last}")
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch = {self.batch} does not divide by micro_batch = {self.micro_batch}"
            )
        if self.adapter.partial and self.init_from is None:
            raise UserError(
                "adapter=lora needs a pretrained base: set init_from= to a diffusers folder, or "
                "train everything with adapter=none"
            )
        if self.adapter.partial and self.average.offload:
            raise UserError(
                "average.offload does not work with adapter=lora, whose averages are small and "
                "part of the network in use: leave it false"
            )
        self.profile.check(self.steps)
        self.objective.shares.counts(self.batch)

    def yaml(self) -> str:
        """Return the whole configuration as YAML."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def weights(self) -> Weights:
        """Open the initial weights."""
        if self.init_from is None:
            base = self.model.random_weights(self.seed)
        else:
            base = self.model.stored_weights(located(self.init_from), seed=self.seed)
        return self.adapter.weights(base, seed=self.seed)

    def about(self) -> list[dict[str, Any]]:
        """Say what there is to know about the data."""
        return [
            asdict(one.manifest.about) | {"latent_shapes": [list(s) for s in one.manifest.buckets]}
            for one in self.data.train()
        ]

    def deal(self, world: World) -> Deal:
        """Divide the global batch among the ranks; UserError if it does not divide."""
        return Deal(
            batch=self.batch, micro_batch=self.micro_batch, ranks=world.size, rank=world.rank
        )

    def check(self, world: World) -> None:
        """Refuse, before anything is written, what does not fit together: UserError."""
        self.deal(world)
        self.engine.check(self, ranks=world.size)
        self.adapter.check(self.model)
        if reason := self.model.untrainable:
            raise UserError(reason)
        self.evals.check(self.data.held_out())
        stream, held_out = self.data.stream(seed=self.seed, batch=self.batch), self.data.held_out()
        form, there = stream.sets[0].manifest.form, held_out.manifest.form
        for shape in (*stream.shapes, held_out.latent_shape):
            self.model.check(
                shape,
                form.text_width,
                pooled_width=form.pooled_width,
                references=form.references,
            )
        if not form.has_latents and not self.objective.image_free:
            raise UserError(
                "data.path holds prompts without images: choose objective=twinflow_image_free, or "
                "a set with latents"
            )
        if not there.has_latents and not self.objective.image_free:
            raise UserError(
                "data.heldout holds prompts without images, and losses are measured on images: "
                "prepare it with images=stored or images=generated"
            )
        if (form.text_width, form.pooled_width) != (there.text_width, there.pooled_width):
            raise UserError(
                f"data.heldout has texts of width {there.text_width} (pooled: "
                f"{there.pooled_width}), the training set of {form.text_width} (pooled: "
                f"{form.pooled_width}): prepare both with the same encoders"
            )
        refuse_unfit(self, world)
        if self.checkpoints is not None:
            refuse_unusable(self.checkpoints, empty=self.resume is Resume.never, world=world)

    def shard(self, world: World) -> Sharded:
        """Build the sharded student and its teacher."""
        decay = self.objective.teacher_decay
        return self.engine.shard(
            self.model,
            self.weights(),
            adapter=self.adapter,
            optim=self.optim,
            decay=decay,
            average=self.average,
            world=world,
        )

    def health(self, engine: Sharded) -> Health:
        """Ask after the student and its teacher at evaluations."""
        return Health(
            student=engine.student,
            teacher=engine.teacher,
            delta=self.objective.delta,
            order=self.objective.order,
            dtype=self.engine.precision.dtype,
        )

    def saves(self, folder: Path, engine: Sharded, progress: Progress, world: World) -> Checkpoints:
        """Open the run's checkpoints."""
        return Checkpoints(
            folder=self.checkpoints or folder / "checkpoints",
            engine=engine,
            progress=progress,
            world=world,
            identity=self.identity(),
            defaults=self.defaults(),
            keep=self.keep_last,
            keep_every=self.keep_every,
            patience_seconds=self.faults.saving_seconds,
        )

    def log(self, folder: Path, progress: Progress, world: World) -> AbstractContextManager[Log]:
        """Open the run's log where the progress stands."""
        return open_log(
            self.tracking,
            name=self.name,
            folder=folder,
            config=self.config() | (about_code(folder) if world.main else {}),
            world=world,
            step=progress.step,
            steps=self.steps,
            every=self.log_every,
        )

    @cached_property
    def work(self) -> Work:
        """What a pass of the network does; some seconds for the largest."""
        (assembly,) = self.adapter.assemble(self.model, [])
        return work(self.model, assembly.net)

    def meter(self, world: World) -> Meter:
        """Measure the speed of steps."""
        cuda = world.device.type == "cuda"
        gpu = gpus.named(torch.cuda.get_device_name(world.device)) if cuda else None
        return Meter(
            work=self.work,
            order=self.objective.order,
            patch=self.model.patch,
            recompute=0 if self.engine.keep_products else self.engine.recompute,
            flops=gpu.flops if gpu else None,
            ranks=world.size,
        )

    def operations(self, deal: Deal) -> dict[str, float]:
        """Count a rank's operations in a step by pass, with the held-out set's texts."""
        held_out = self.data.held_out()
        texts = [n for entry in held_out.index(0) for n in entry.tokens]
        pictures = 1 + held_out.manifest.form.references
        image = pictures * math.prod(held_out.latent_shape[1:]) // self.model.patch**2
        rows = rows_by_pass(self.objective, deal, seed=self.seed)
        return self.work.step(rows, image, sum(texts) / len(texts))

    def banner(self, engine: Sharded, world: World) -> str:
        """Say once what the run does: its arithmetic, its size and the passes of a step."""
        deal = self.deal(world)
        trained = sum(math.prod(shape) for shape in engine.shapes().values())
        beside = f" beside {engine.frozen / 1e6:,.2f}M frozen ones" if engine.frozen else ""
        roles = self.objective.shares.counts(self.batch)
        spent = cost(self.objective, deal, seed=self.seed)
        mine, operations = self.batch // world.size, self.operations(deal)
        parts = ", ".join(f"{v / 1e12:,.3g} {name}" for name, v in operations.items() if v)
        shared = ", ".join(f"{n} {role}" for role, n in roles.items() if n)
        return (
            f"{self.name}: {trained / 1e6:,.2f}M parameters{beside} on {world.size} x "
            f"{world.device.type}\n"
            f"batch {self.batch} = {world.size} ranks x {deal.micro_steps} micro-steps x "
            f"{self.micro_batch}: {shared}\n"
            f"a step of a rank: {mine} samples forward and backward, {spent.passes} forward only "
            f"({spent.passes / mine:.2f} each, {spent.fillers} of them fillers), "
            f"{spent.calls} network calls\n"
            f"{sum(operations.values()) / 1e12:,.3g} TFLOP in it: {parts}"
        )

    def config(self) -> dict[str, Any]:
        """Return the whole configuration as plain values."""
        return plain(self)

    def identity(self) -> dict[str, Any]:
        """Return what defines the run: a checkpoint with another identity is not continued."""
        config = self.config()
        keys = ("model", "adapter", "objective", "seed", "batch", "init_from")
        slow = {"slow": config["average"]["slow"]}
        if self.adapter.partial and self.init_from is not None:
            # Read again at every start, so what is there counts, and not where.
            base = self.model.stored_weights(located(self.init_from), seed=self.seed)
            config["init_from"] = fingerprint(self.model, base)
        identity: dict[str, Any] = scrub(
            {key: config[key] for key in keys} | {"data": self.data.identity(), "average": slow}
        )
        return identity

    def defaults(self) -> dict[str, Any]:
        """Return the identity's values where nobody chose any, and before they could be chosen."""
        parts = {"model": self.model, "objective": self.objective, "average": self.average}
        older = plain(type(self.adapter)()) | plain(NoAdapter())
        return {name: plain(type(part)()) for name, part in parts.items()} | {"adapter": older}


GROUPS: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "qwen_image": QwenImage(),
        "qwen_image_edit": QwenImageEdit(),
        "sana_0.6b": sana_600m(),
        "sana_1.6b": Sana(),
        "sd35_medium": SD3(),
        "z_image": ZImage(),
        "z_image_released": ZImage(convention=Convention.released),
        "openuni_l": OpenUni(),
    },
    "adapter": {"none": NoAdapter(), "lora": LoRA()},
    "objective": {
        "twinflow": TwinFlow(),
        "twinflow_paper": presets.twinflow_paper(),
        "twinflow_wide": presets.twinflow_wide(),
        "twinflow_scratch": presets.twinflow_scratch(),
        "twinflow_lora_order1": presets.twinflow_lora_order1(),
        "twinflow_image_free": presets.twinflow_image_free(),
        "rcgm": presets.rcgm(),
        "rcgm_pure": presets.rcgm_pure(),
        "flow_matching": presets.flow_matching(),
    },
    "engine": ENGINES,
    "optim": {"adamw": AdamW(), "adamw8bit": AdamW8bit(), "radam": RAdam()},
    "data": {"shards": Shards()},
    "evals": EVALS,
    "tracking": {"wandb": WandB(), "none": NoTracking()},
}
"""Every option of every group; its defaults are the instance's values."""


def model_of(config: Mapping[str, Any]) -> Model:
    """Make a model again from its part of a run's plain configuration; UserError if unknown."""
    model: Model = _made_of("model", config)
    return model


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """Make an adapter again from its part, which runs of older programs lack: they have none."""
    adapter: Adapter = _made_of("adapter", config or {"_type": "NoAdapter"})
    return adapter


def _made_of(group: str, config: Mapping[str, Any]) -> Any:
    """Make an option again; a key that the configuration does not have yet keeps its default."""
    for option in GROUPS[group].values():
        if type(option).__name__ == config["_type"]:
            defaults = vars(option)
            values = {key: value for key, value in config.items() if key != "_type"}
            for key in values.keys() & defaults.keys():
                if isinstance(defaults[key], Enum):
                    values[key] = type(defaults[key])[values[key]]
            return replace(option, **values)
    raise UserError(f"{group} {config['_type']} is not one that this version knows")


def register() -> None:
    """Tell Hydra the groups."""
    store = ConfigStore.instance()
    store.store(name="run", node=Run)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)
