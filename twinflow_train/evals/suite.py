"""Evaluations that a run can choose: dataclasses of options, Hydra's group `evals`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twinflow_train.batch import Condition, Velocity
from twinflow_train.data.sample import Sample, condition_of
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.evals.deal import Deal
from twinflow_train.evals.judge import Judge, labelled
from twinflow_train.evals.results import Evaluation, Result, short_name
from twinflow_train.flow.sampler import Sampler, sample
from twinflow_train.rng import digest, generator

Networks = Mapping[str, Velocity]
"""Networks by the name of their role: `base`, `raw`, `ema`; in the same order on every rank."""


@dataclass(kw_only=True)
class Evals:
    """What every evaluation has.

    samplers: for the network in training. base: for the network at the start, made once.
    Two samplers of one list need different names (`results.short_name`), or UserError.
    """

    samplers: list[Sampler] = field(default_factory=list)
    base: list[Sampler] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, samplers in {"samplers": self.samplers, "base": self.base}.items():
            names = [short_name(sampler) for sampler in samplers]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(
                    f"evals.{key} has two samplers named {twice[0]}; they must differ in NFE, "
                    "style, order, guidance, stochasticity, sde or extrapolation"
                )

    def check(self, heldout: ShardSet) -> None:
        """Refuse what would only fail at an evaluation: UserError."""

    def evaluate(
        self, networks: Networks, samplers: Sequence[Sampler], heldout: ShardSet, world: World
    ) -> Evaluation:
        """Try every network with every sampler; the same result on every rank; collective."""
        raise NotImplementedError


@dataclass(kw_only=True)
class NoEvals(Evals):
    """Evaluates nothing."""

    def evaluate(
        self, networks: Networks, samplers: Sequence[Sampler], heldout: ShardSet, world: World
    ) -> Evaluation:
        """Return an empty evaluation."""
        return Evaluation()


@dataclass(kw_only=True)
class Digits(Evals):
    """Digits judged by a classifier, all networks and samplers on the same prompts and noise.

    Image i takes a caption of held-out sample i (modulo their number) and noise keyed by
    (seed, i), so results depend neither on `batch` nor on the ranks, up to rounding.

    images: images for each network and sampler; distances of other numbers do not compare.
    batch: images of one network call on one rank (twice as many rows where guided).
    judge: file that `evals.judge.fit_judge` wrote. seed: of noise, and of which captions are taken.
    rows: prompts in the picture, at most one a class.
    """

    images: int = 500
    batch: int = 250
    judge: str = "datasets/digits/judge.safetensors"
    seed: int = 0
    rows: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in {"images": self.images, "batch": self.batch, "rows": self.rows}.items():
            if value < 1:
                raise UserError(f"evals.{key} is {value}; it must be at least 1")

    def check(self, heldout: ShardSet) -> None:
        """Refuse a missing judge and images that it cannot judge: UserError."""
        Judge.load(self.judge)
        shape = heldout.latent_shape
        if not heldout.manifest.form.has_latents:
            raise UserError("evals=digits compares with images, and data.heldout has prompts alone")
        if shape != (1, 28, 28):
            raise UserError(
                f"evals=digits judges images of shape (1, 28, 28), the data have {shape}"
            )

    def evaluate(
        self, networks: Networks, samplers: Sequence[Sampler], heldout: ShardSet, world: World
    ) -> Evaluation:
        """Generate, judge and compare; scores: accuracy, frechet, diversity, seconds_per_image.

        seconds_per_image is the clock time of sampling on one device, averaged over ranks. Raises
        UserError if there is no judge or the held-out data are not labelled 28x28 images.
        """
        exam = _Exam.prepare(self, heldout, world)
        results, pictures = [], {}
        for model, velocity in networks.items():
            for sampler in samplers:
                images, seconds = exam.generate(velocity, sampler)
                result = Result.of(
                    model, sampler, exam.score(images) | {"seconds_per_image": seconds}
                )
                results.append(result)
                pictures[result.key] = exam.picture(images)
        return replace(exam.about, results=results, pictures=pictures)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The inputs of the images that a rank generates together."""

    numbers: list[int]
    seed: int
    noise: Float[Tensor, "b 1 28 28"]
    cond: Condition

    def eps(self, step: int) -> Float[Tensor, "b 1 28 28"]:
        """Draw the fresh noise of a stochastic step."""
        return _noise("eval-eps", self.seed, self.numbers, step).to(self.noise.device)


@dataclass(kw_only=True)
class _Exam:
    """What one evaluation holds ready: this rank's prompts, the judge, and real images to compare.

    labels: of all images; shown: the numbers of those in the picture.
    """

    suite: Digits
    heldout: ShardSet
    deal: Deal
    judge: Judge
    labels: Int[Tensor, " images"]
    real_features: Float[Tensor, "reals features"]
    real_labels: Int[Tensor, " reals"]
    shown: list[int]
    about: Evaluation

    @staticmethod
    def prepare(suite: Digits, heldout: ShardSet, world: World) -> _Exam:
        """Read the judge and the held-out images, and choose the first image of each class."""
        suite.check(heldout)
        judge = Judge.load(suite.judge).to(world.device)
        reals, real_labels = labelled(heldout)
        labels = real_labels[torch.arange(suite.images) % len(real_labels)]
        found = labels.tolist()
        shown = [found.index(label) for label in sorted(set(found))][: suite.rows]
        with torch.no_grad():
            _, features = judge(reals.to(world.device))
        return _Exam(
            suite=suite,
            heldout=heldout,
            deal=Deal(count=suite.images, world=world),
            judge=judge,
            labels=labels,
            real_features=features.cpu(),
            real_labels=real_labels,
            shown=shown,
            about=Evaluation(
                real={"accuracy": judge.accuracy, "frechet": judge.frechet},
                captions=[_prompt(suite, heldout, image).caption for image in shown],
                reals=reals[[image % len(reals) for image in shown]],
            ),
        )

    def generate(self, velocity: Velocity, sampler: Sampler) -> tuple[Tensor, float]:
        """Generate this rank's images, and say how many seconds each took."""
        parts, seconds = [], 0.0
        for call in self.calls:
            began = self._now()
            parts.append(
                sample(velocity, call.noise, call.cond, sampler, null=self.null, eps=call.eps)
            )
            seconds += self._now() - began
        mine = torch.cat(parts).clamp(-1, 1)
        each = torch.tensor(seconds / len(mine), device=mine.device)
        return mine, float(self.deal.world.gather(each).mean())

    def score(self, mine: Float[Tensor, "mine 1 28 28"]) -> dict[str, float]:
        """Score all ranks' images; collective."""
        with torch.no_grad():
            logits, features = (self.deal.collect(part).cpu() for part in self.judge(mine))
        return {
            "accuracy": metrics.accuracy(logits, self.labels),
            "frechet": metrics.frechet(features, self.real_features),
            "diversity": metrics.diversity(
                features, self.labels, self.real_features, self.real_labels
            ),
        }

    def picture(self, mine: Float[Tensor, "mine 1 28 28"]) -> Float[Tensor, "rows 1 28 28"]:
        """Bring together the images of the picture; collective."""
        return self.deal.collect(mine)[self.shown].cpu()

    @cached_property
    def calls(self) -> list[_Call]:
        """Read this rank's prompts and draw its noise, once for all networks and samplers."""
        return [
            _Call(
                numbers=numbers,
                seed=self.suite.seed,
                noise=_noise("eval", self.suite.seed, numbers).to(self.deal.world.device),
                cond=condition_of(
                    [_prompt(self.suite, self.heldout, number) for number in numbers]
                ).to(self.deal.world.device),
            )
            for numbers in self.deal.chunks(self.suite.batch)
        ]

    @cached_property
    def null(self) -> Condition:
        """The null prompt on the device."""
        return self.heldout.null.to(self.deal.world.device)

    def _now(self) -> float:
        """Read the clock once the device has done what it was given."""
        if self.deal.world.device.type != "cpu":
            torch.accelerator.synchronize(self.deal.world.device)
        return time.perf_counter()


def _prompt(suite: Digits, heldout: ShardSet, number: int) -> Sample:
    """Read the held-out sample of an image, with one of its captions."""
    caption = digest("eval-caption", suite.seed, number)
    return heldout.read(number % len(heldout), caption=caption)


def _noise(use: str, seed: int, numbers: list[int], *path: int) -> Float[Tensor, "b 1 28 28"]:
    """Draw each image's own noise."""
    draws = [generator(use, seed, number, *path) for number in numbers]
    return torch.stack([torch.randn(1, 28, 28, generator=draw) for draw in draws])
