"""What an evaluation found: numbers for tables and curves, images for the picture, kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twinflow_train.errors import UserError
from twinflow_train.evals.grid import Column
from twinflow_train.files import save_tensors, whole_file
from twinflow_train.flow.sampler import Sampler, Style

RESULTS, PICTURES = "results.json", "pictures.safetensors"


def short_name(sampler: Sampler) -> str:
    """Name a sampler: `nfe` and its network evaluations, then what is not plain few-step sampling.

    `nfe1`; `nfe2-s1` with stochasticity 1; `nfe4-any`; `nfe30-multi`; `nfe60-multi-g2` with
    guidance 2; `-order2`, `-sde`, `-q0.5` (extrapolation). Gaps and exponents are not in the name.
    """
    parts = {
        f"nfe{sampler.nfe}": True,
        sampler.style.name: sampler.style is not Style.few,
        f"order{sampler.order}": sampler.order != 1,
        f"g{sampler.guidance:g}": sampler.guidance != 1,
        f"s{sampler.stochasticity:g}": sampler.stochasticity != 0,
        "sde": sampler.sde,
        f"q{sampler.extrapolation:g}": sampler.extrapolation != 0,
    }
    return "-".join(part for part, said in parts.items() if said)


@dataclass(kw_only=True)
class Result:
    """What one model reached with one sampler.

    model: `base` (the network at the start), `raw` or `ema`; sampler: its `short_name`.
    scores: by name; a suite has the scores that it can compute, a score that is undefined is nan.
    """

    model: str
    sampler: str
    nfe: int
    steps: int
    style: str
    order: int = 1
    guidance: float = 1.0
    stochasticity: float = 0.0
    sde: bool = False
    scores: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(model: str, sampler: Sampler, scores: dict[str, float]) -> Result:
        """Describe a model, a sampler and what they reached."""
        return Result(
            model=model,
            sampler=short_name(sampler),
            nfe=sampler.nfe,
            steps=sampler.steps,
            style=sampler.style.name,
            order=sampler.order,
            guidance=sampler.guidance,
            stochasticity=sampler.stochasticity,
            sde=sampler.sde,
            scores=scores,
        )

    @property
    def key(self) -> str:
        """Return the name that no other result of an evaluation has: `ema/nfe2-s1`."""
        return f"{self.model}/{self.sampler}"

    @property
    def heading(self) -> str:
        """Return the heading of its column in a picture: model, NFE, and the rest of the name."""
        rest = self.sampler.split("-")[1:]
        return f"{self.model}\n{self.nfe} NFE\n{' '.join(rest)}"

    def row(self) -> dict[str, Any]:
        """Return a flat JSON object, scores beside settings; a score that is nan becomes null."""
        row = asdict(self)
        scores: dict[str, float] = row.pop("scores")
        return row | _json(scores)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Undo `row`: what is not a setting is a score."""
        settings = {k: v for k, v in row.items() if k in cls.__dataclass_fields__}
        scores = {k: v for k, v in row.items() if k not in settings}
        return cls(**settings, scores=_scores(scores))


@dataclass(kw_only=True)
class Evaluation:
    """Results, and a few of the images behind them.

    real: what real images reach: `accuracy`, the judge's on held-out images, and `frechet`,
        between training and held-out images, the floor for generated ones.
    captions, reals: prompts of the picture's rows and the held-out images they belong to.
    pictures: the generated images of these prompts, by the result's key.
    """

    results: list[Result] = field(default_factory=list)
    real: dict[str, float] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    reals: Float[Tensor, "rows *chw"] | None = None
    pictures: dict[str, Float[Tensor, "rows *chw"]] = field(default_factory=dict)

    def __add__(self, other: Evaluation) -> Evaluation:
        """Show `other` after this one; this one's pictures only if they are of the same prompts."""
        same = self.captions == other.captions or not other.captions
        first = other if other.captions else self
        return Evaluation(
            results=self.results + other.results,
            real=self.real | other.real,
            captions=first.captions,
            reals=first.reals,
            pictures=(self.pictures if same else {}) | other.pictures,
        )

    def metrics(self) -> dict[str, float]:
        """Return what a log takes: `eval/ema/nfe1/frechet` for model, sampler and score."""
        return {
            f"eval/{result.key}/{score}": value
            for result in self.results
            for score, value in result.scores.items()
        }

    def gaps(self) -> dict[str, float]:
        """Return how far the network that goes out, averaged or not, is from the base.

        eval/nfe1/gap: its Frechet distance minus the base's best one; below 0 it is the better one.
        eval/nfe1/distance: the root mean square difference of its pictures from the base's with
        most evaluations, of the same prompts and noise; two such maps need not agree to be good.
        """
        bases = [result for result in self.results if result.model == "base"]
        models = {result.model for result in self.results}
        ours = [r for r in self.results if r.model == ("ema" if "ema" in models else "raw")]
        best = min((r.scores["frechet"] for r in bases if "frechet" in r.scores), default=None)
        seen = [result for result in bases if result.key in self.pictures]
        most = max(seen, key=lambda result: result.nfe, default=None)
        found = {}
        for result in ours:
            if best is not None and "frechet" in result.scores:
                found[f"eval/{result.sampler}/gap"] = result.scores["frechet"] - best
            if most is not None and result.key in self.pictures:
                apart = self.pictures[result.key].float() - self.pictures[most.key].float()
                found[f"eval/{result.sampler}/distance"] = float(apart.square().mean().sqrt())
        return found

    def summary(self) -> dict[str, Any]:
        """Return the JSON object that `summary.json` takes: `results` and, if known, `real`."""
        rows = {"results": [result.row() for result in self.results]}
        return rows | ({"real": _json(self.real)} if self.real else {})

    def columns(self) -> list[Column]:
        """Return the picture's columns: held-out images, then each result that has images."""
        real = [] if self.reals is None else [Column(heading="real", images=self.reals)]
        return real + [
            Column(heading=result.heading, images=self.pictures[result.key])
            for result in self.results
            if result.key in self.pictures
        ]

    def save(self, folder: Path) -> None:
        """Write `results.json` and `pictures.safetensors`, each whole or not at all."""
        tensors = {} if self.reals is None else {"real": self.reals}
        tensors |= self.pictures
        said = json.dumps(self.summary() | {"captions": self.captions}, indent=1) + "\n"
        with whole_file(folder / PICTURES) as pictures:
            save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, pictures)
        with whole_file(folder / RESULTS) as results:
            results.write_text(said)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; UserError if it is not there or not whole."""
        try:
            said = json.loads((folder / RESULTS).read_text())
            tensors = load_file(folder / PICTURES)
            return cls(
                results=[Result.from_row(row) for row in said["results"]],
                real=_scores(said.get("real", {})),
                captions=said["captions"],
                reals=tensors.pop("real", None),
                pictures=tensors,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: holds no evaluation ({error.filename} is missing)"
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: not a whole evaluation ({error!r})") from error


def _json(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Write what is not finite as null, which is all that JSON has for it."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def _scores(said: Mapping[str, float | None]) -> dict[str, float]:
    """Undo `_json`."""
    return {name: math.nan if value is None else value for name, value in said.items()}
