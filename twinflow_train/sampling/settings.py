"""Sampling as configuration, and what it writes."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from twinflow_train.engines.base import Precision
from twinflow_train.errors import UserError
from twinflow_train.evals.grid import Column
from twinflow_train.evals.grid import draw as draw_grid
from twinflow_train.evals.grid import save as save_grid
from twinflow_train.files import whole_file
from twinflow_train.flow.sampler import Sampler, Style
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Encoders
from twinflow_train.sampling.origin import BASE, Origin, find
from twinflow_train.sampling.pipeline import Drawn, TwinFlowPipeline

GRID, RECORD = "grid.png", "samples.jsonl"


@dataclass(kw_only=True)
class Changes:
    """Keys of `Sampler` that are to be otherwise than published; null leaves them as they are."""

    order: int | None = None
    stochasticity: float | None = None
    sde: bool | None = None
    extrapolation: float | None = None
    kumaraswamy: list[float] | None = None
    start_gap: float | None = None
    end_gap: float | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None

    def made(self, published: Sampler) -> Sampler:
        """Return settings with these changes; UserError names a value that is refused."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        return replace(published, **given)


@dataclass(kw_only=True)
class Sampling:
    """Prompts to pictures.

    from_ (written `from=`): a run, an export, a diffusers folder, or a repository of the Hugging
    Face hub. prompts: a text, a list of them, or a file with one a line.
    folder: for the pictures. steps, style: choose among the published settings; null: those that
    travel with the weights. sampler: what is to be otherwise.
    seed: of the noise. images: a prompt. pictures: files of what is to be edited.
    height, width: in pixels; null is the model's usual size.
    batch: pictures in one network call. precision: of the network; null is bf16 on a GPU.
    model: its size, where it is no released one and no export says it.
    encoders: where the VAE and the text encoder are, null for those that belong to the weights.
    compare: a base, drawn beside with the settings `base`, from the same noise.
    """

    from_: str = "???"
    prompts: Any = "???"
    folder: str = "samples"
    steps: int | None = None
    style: Style | None = None
    sampler: Changes = field(default_factory=Changes)
    seed: int = 0
    images: int = 1
    pictures: list[str] = field(default_factory=list)
    height: int | None = None
    width: int | None = None
    batch: int = 4
    precision: Precision | None = None
    model: Model | None = None
    encoders: Encoders | None = None
    compare: str | None = None
    base: Sampler = field(default_factory=lambda: BASE)

    def __post_init__(self) -> None:
        rules = [
            ("images", self.images >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
        ]
        for key, good, allowed in rules:
            if not good:
                raise UserError(f"{key} is {vars(self)[key]}; it must be {allowed}")

    def texts(self) -> list[str]:
        """Return the prompts; UserError if there are none."""
        given = self.prompts
        if isinstance(given, str) and _is_file(given):
            try:
                given = Path(given).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"prompts: {self.prompts} cannot be read ({error})") from error
        lines = [given] if isinstance(given, str) else given
        if not isinstance(lines, Sequence):
            raise UserError(
                f"prompts: {given!r} is neither a text, nor a list of texts, nor a file"
            )
        found = [str(line).strip() for line in lines if str(line).strip()]
        if not found:
            raise UserError(f"prompts: there is none in {self.prompts!r}")
        return found


def _is_file(text: str) -> bool:
    """Tell whether a text names a file; what cannot be a name does not."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def draw(settings: Sampling) -> list[str]:
    """Draw all pictures, write them with a grid and a record; return lines that say so."""
    prompts = settings.texts()
    origin = find(settings.from_, model=settings.model, encoders=settings.encoders)
    how = settings.sampler.made(origin.sampler(steps=settings.steps, style=settings.style))
    drawn = {"": _drawn(settings, prompts, origin, how)}
    if settings.compare is not None:
        other = find(
            settings.compare,
            model=settings.model,
            encoders=settings.encoders or origin.encoders,
            key="compare",
        )
        drawn["base"] = _drawn(settings, prompts, other, settings.base)
    folder = Path(settings.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder: {folder} cannot be made ({error.strerror})") from error
    _write(folder, settings, prompts, drawn)
    said = [
        f"{_heading(name, one.sampler)}: {len(one.tensors)} pictures, {_pace(one)}"
        for name, one in drawn.items()
    ]
    return [*said, f"pictures: {folder}; side by side: {folder / GRID}"]


def _drawn(settings: Sampling, prompts: Sequence[str], origin: Origin, sampler: Sampler) -> Drawn:
    """Load, draw, and let go of the weights again."""
    precision = settings.precision
    pipeline = TwinFlowPipeline.of(origin, dtype=precision.dtype if precision else None)
    found = pipeline(
        prompts,
        sampler=sampler,
        height=settings.height,
        width=settings.width,
        seed=settings.seed,
        num_images_per_prompt=settings.images,
        pictures=settings.pictures,
        batch=settings.batch,
    )
    del pipeline
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _write(
    folder: Path, settings: Sampling, prompts: Sequence[str], drawn: dict[str, Drawn]
) -> None:
    lines = []
    for name, one in drawn.items():
        how = {k: v.name if isinstance(v, Enum) else v for k, v in asdict(one.sampler).items()}
        for number, image in enumerate(one.images):
            prompt, nth = divmod(number, settings.images)
            file = f"{prompt:04d}-{nth}{'-' if name else ''}{name}.png"
            with whole_file(folder / file) as unfinished:
                image.save(unfinished, format="PNG")
            lines.append(
                {
                    "file": file,
                    "prompt": prompts[prompt],
                    "seed": settings.seed,
                    "number": number,
                    "size": [image.height, image.width],
                    "seconds": one.seconds,
                    "sampler": how,
                }
            )
    with whole_file(folder / RECORD) as unfinished, unfinished.open("w") as file_:
        file_.writelines(json.dumps(line) + "\n" for line in lines)
    columns = [
        Column(
            heading="" if nth else f"{_heading(name, one.sampler)}\n{_pace(one)}",
            images=one.tensors[nth :: settings.images],
        )
        for name, one in drawn.items()
        for nth in range(settings.images)
    ]
    save_grid(draw_grid(columns, prompts=prompts), folder / GRID)


def _heading(name: str, sampler: Sampler) -> str:
    return f"{name + ', ' if name else ''}{sampler.style.name} {sampler.nfe} NFE"


def _pace(one: Drawn) -> str:
    return f"{one.seconds:.2f} s a picture"
