"""Who is compared: models with their settings, and how each draws."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from twinflow_train.errors import UserError
from twinflow_train.evals.results import Result, short_name
from twinflow_train.evaluate.settings import Baseline, Evaluating
from twinflow_train.flow.sampler import Sampler
from twinflow_train.models.stock import StockPipeline
from twinflow_train.sampling.origin import Origin, find
from twinflow_train.sampling.pipeline import TwinFlowPipeline


class Artist(Protocol):
    """A loaded model that draws with one entry's settings."""

    def draw(
        self, texts: Sequence[str], *, images: int, first: int, batch: int
    ) -> tuple[list[Image.Image], float]:
        """Draw `images` pictures of each text, numbered from `first`; and the network's seconds."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table: a model with one setting, which is its sampler or its baseline's.

    folder: its own, below that of the evaluation. made_of: what its pictures depend on, besides the
    prompts. result: its row, without scores.
    """

    folder: Path
    made_of: dict[str, Any]
    result: Result
    how: Sampler | Baseline


@dataclass(kw_only=True)
class Contender:
    """A model of ours or a base, with the settings that it is drawn with."""

    settings: Evaluating
    label: str
    origin: Origin
    samplers: list[Sampler]

    def entries(self) -> list[Entry]:
        """List its lines."""
        made_of = _made_of(self.settings, self.origin.folder)
        return [
            Entry(
                folder=Path(self.label, short_name(sampler)),
                made_of=made_of | {"sampler": plain(sampler)},
                result=Result.of(self.label, sampler, {}),
                how=sampler,
            )
            for sampler in self.samplers
        ]

    def artists(
        self, wanted: Sequence[Entry], texts: Sequence[str], device: torch.device
    ) -> Iterator[Artist]:
        """Load once, and yield who draws each of the entries.

        UserError for a text that is too long for the text encoder, before anything is drawn.
        """
        precision = self.settings.precision
        pipeline = TwinFlowPipeline.of(
            self.origin, device=device, dtype=precision.dtype if precision else None
        )
        pipeline.check(texts)
        for entry in wanted:
            assert isinstance(entry.how, Sampler)
            yield _Ours(pipeline, self.settings, entry.how)
        del pipeline
        forget()


@dataclass(frozen=True)
class _Ours:
    pipeline: TwinFlowPipeline
    settings: Evaluating
    sampler: Sampler

    def draw(
        self, texts: Sequence[str], *, images: int, first: int, batch: int
    ) -> tuple[list[Image.Image], float]:
        drawn = self.pipeline(
            texts,
            sampler=self.sampler,
            height=self.settings.height,
            width=self.settings.width,
            seed=self.settings.seed,
            num_images_per_prompt=images,
            batch=batch,
            first=first,
        )
        return drawn.images, drawn.seconds * len(drawn.tensors)


@dataclass(kw_only=True)
class Stock:
    """A pipeline of diffusers, perhaps with a few-step LoRA, with its one setting."""

    settings: Evaluating
    label: str
    baseline: Baseline

    def entries(self) -> list[Entry]:
        """List its one line."""
        said = self.baseline
        guided = 2 if said.guidance > 1 else 1
        result = Result(
            model=self.label,
            sampler=f"nfe{said.steps * guided}-stock",
            nfe=said.steps * guided,
            steps=said.steps,
            style="stock",
            guidance=said.guidance,
        )
        made_of = _made_of(self.settings, Path(said.pipeline or ""))
        if said.lora:
            made_of["lora"] = [said.lora, Path(said.lora).stat().st_mtime_ns]
        return [
            Entry(
                folder=Path(self.label, result.sampler),
                made_of=made_of | {"steps": said.steps, "guidance": said.guidance},
                result=result,
                how=said,
            )
        ]

    def artists(
        self, wanted: Sequence[Entry], texts: Sequence[str], device: torch.device
    ) -> Iterator[Artist]:
        """Load, and yield who draws the entry; stock pipelines cut long texts as they do."""
        precision, said = self.settings.precision, self.baseline
        for _ in wanted:
            yield StockPipeline(
                said.pipeline or "",
                lora=said.lora,
                steps=said.steps,
                guidance=said.guidance,
                height=self.settings.height,
                width=self.settings.width,
                seed=self.settings.seed,
                device=device,
                dtype=precision.dtype if precision else None,
            )
        forget()


def contenders(settings: Evaluating) -> list[Contender | Stock]:
    """Find everybody that is to be compared; UserError if somebody is missing."""
    first = find(settings.from_, model=settings.model, encoders=settings.encoders)
    found: list[Contender | Stock] = [_few(settings, first, settings.from_)]
    for where in settings.also:
        other = find(where, model=settings.model, encoders=settings.encoders, key="also")
        found.append(_few(settings, other, where))
    if settings.compare is not None:
        base = find(
            settings.compare,
            model=settings.model or first.model,
            encoders=settings.encoders or first.encoders,
            key="compare",
        )
        samplers = [settings.base]
        found.append(Contender(settings=settings, label="base", origin=base, samplers=samplers))
    if settings.baseline.pipeline is not None:
        found.append(_stock(settings))
    labels = [each.label for each in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(
            f"two models are called {twice[0]}: give folders of different names, or baseline.name"
        )
    return found


def _few(settings: Evaluating, origin: Origin, where: str) -> Contender:
    samplers = [origin.sampler(steps=steps, style=settings.style) for steps in settings.nfe]
    return Contender(settings=settings, label=_label(where), origin=origin, samplers=samplers)


def _stock(settings: Evaluating) -> Stock:
    said = settings.baseline
    if not (Path(said.pipeline or "") / "model_index.json").is_file():
        raise UserError(
            f"baseline.pipeline: {said.pipeline} has no model_index.json, it is no diffusers "
            "pipeline folder"
        )
    if said.lora is not None and not Path(said.lora).is_file():
        raise UserError(f"baseline.lora: there is no file {said.lora}")
    label = said.name or _label(
        str(Path(said.lora).with_suffix("")) if said.lora else said.pipeline
    )
    return Stock(settings=settings, label=label, baseline=said)


def _label(where: str | None) -> str:
    """Name a model by its folder, or the run's if that is an export."""
    path = Path(str(where).partition("@")[0])
    named = path.parent if path.name.startswith("export") else path
    return named.name or "model"


def _made_of(settings: Evaluating, weights: Path) -> dict[str, Any]:
    """Say what pictures depend on: the weights' files by place and date, seed and size."""
    newest = max((f.stat().st_mtime_ns for f in weights.rglob("*.safetensors")), default=0)
    return {
        "weights": [str(weights.resolve()), newest],
        "seed": settings.seed,
        "size": [settings.height, settings.width],
        "precision": settings.precision.name if settings.precision else None,
    }


def plain(sampler: Sampler) -> dict[str, Any]:
    """Return a sampler's settings as JSON has them."""
    return {k: v.name if isinstance(v, Enum) else v for k, v in asdict(sampler).items()}


def forget() -> None:
    """Let go of weights that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
