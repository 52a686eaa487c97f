"""Evaluation as configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from twinflow_train.engines.base import Precision
from twinflow_train.errors import UserError
from twinflow_train.evaluate.suites import Judged, Suite
from twinflow_train.flow.sampler import Sampler, Style
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Encoders
from twinflow_train.models.features import Features
from twinflow_train.sampling.origin import BASE


@dataclass(kw_only=True)
class Baseline:
    """Another few-step model, through the stock diffusers pipeline.

    pipeline: its folder; null is none. lora: a file of LoRA weights to load into it. steps,
    guidance: as it wants them; 1 is no guidance. name: in tables; null is the LoRA's or folder's.
    """

    pipeline: str | None = None
    lora: str | None = None
    steps: int = 4
    guidance: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"baseline.steps is {self.steps}; it must be at least 1")
        if self.guidance < 0:
            raise UserError(f"baseline.guidance is {self.guidance}; it must be 0 or more")
        if self.lora and not self.pipeline:
            raise UserError("baseline.lora needs baseline.pipeline=FOLDER to load it into")


@dataclass(kw_only=True)
class Evaluating:
    """Draw a suite's prompts with one model and others, and compare.

    from_ (written `from=`): a run, an export, a diffusers folder, or a repository of the Hugging
    Face hub. also: more of them, drawn likewise. nfe: numbers of steps; style: of the published
    settings for them. compare: a base, drawn with `base`. baseline: through diffusers.
    suite: what is asked for. features: the network whose features are compared, null for none
    (digits and emoji bring their own). real: a folder of real pictures, or a set of shards.
    folder: for pictures and results; what is there is kept. seed: of the noise.
    height, width: in pixels; null is the model's usual size. batch: pictures in one network call.
    precision: of the networks; null is bf16 on a GPU. rows: prompts in the picture of pictures.
    model, encoders: as for sampling, where weights do not say it.
    """

    from_: str = "???"
    also: list[str] = field(default_factory=list)
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4])
    style: Style | None = None
    compare: str | None = None
    base: Sampler = field(default_factory=lambda: BASE)
    baseline: Baseline = field(default_factory=Baseline)
    suite: Suite = field(default_factory=Suite)
    features: Features | None = None
    real: str | None = None
    folder: str = "evaluation"
    seed: int = 0
    height: int | None = None
    width: int | None = None
    batch: int = 4
    precision: Precision | None = None
    rows: int = 8
    model: Model | None = None
    encoders: Encoders | None = None

    def __post_init__(self) -> None:
        for key in ("batch", "rows"):
            if vars(self)[key] < 1:
                raise UserError(f"{key} is {vars(self)[key]}; it must be at least 1")
        if not self.nfe or min(self.nfe) < 1 or len(set(self.nfe)) < len(self.nfe):
            raise UserError(
                f"nfe is {self.nfe}; give one or more different numbers of steps, such as [1,2,4]"
            )
        if self.real is not None and self.features is None and not isinstance(self.suite, Judged):
            raise UserError(
                "real is compared in a network's features: choose features=dinov2, clip or "
                "inception with features.path=..."
            )
