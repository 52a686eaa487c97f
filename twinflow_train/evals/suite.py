"""Evaluations that a run can choose: dataclasses of options, Hydra's group `evals`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twinflow_train.batch import Velocity
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.evals.agreed import agreed
from twinflow_train.evals.deal import Deal
from twinflow_train.evals.drawing import Drawing
from twinflow_train.evals.judge import Judge, labelled
from twinflow_train.evals.results import Evaluation, Result, short_name
from twinflow_train.flow.sampler import Sampler

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
class Judged(Evals):
    """Images judged by a classifier, all networks and samplers on the same prompts and noise.

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
        judge, shape = Judge.load(self.judge), tuple(heldout.latent_shape)
        if not heldout.manifest.form.has_latents:
            raise UserError("evals.judge judges images, and data.heldout has prompts alone")
        if shape != judge.shape:
            raise UserError(
                f"evals.judge: {self.judge} judges images of shape {judge.shape}, the data have "
                f"{shape}"
            )

    def evaluate(
        self, networks: Networks, samplers: Sequence[Sampler], heldout: ShardSet, world: World
    ) -> Evaluation:
        """Generate, judge and compare; scores: accuracy, frechet, diversity, seconds_per_image.

        seconds_per_image is the clock time of sampling on one device, averaged over ranks. Raises
        UserError if there is no judge or the held-out data are not labelled images of its shape.
        """
        exam = agreed(world, lambda: _Exam.prepare(self, heldout, world))
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


@dataclass(kw_only=True)
class _Exam:
    """What one evaluation holds ready: this rank's prompts, the judge, and real images to compare.

    labels: of all images; shown: the numbers of those in the picture.
    """

    drawing: Drawing
    judge: Judge
    labels: Int[Tensor, " images"]
    real_features: Float[Tensor, "reals features"]
    real_labels: Int[Tensor, " reals"]
    shown: list[int]
    about: Evaluation

    @staticmethod
    def prepare(suite: Judged, heldout: ShardSet, world: World) -> _Exam:
        """Read the judge and the held-out images, and choose the first image of each class."""
        suite.check(heldout)
        judge = Judge.load(suite.judge).to(world.device)
        reals, real_labels = labelled(heldout)
        labels = real_labels[torch.arange(suite.images) % len(real_labels)]
        found = labels.tolist()
        shown = [found.index(label) for label in sorted(set(found))][: suite.rows]
        with torch.no_grad():
            _, features = judge(reals.to(world.device))
        drawing = Drawing(
            heldout=heldout,
            deal=Deal(count=suite.images, world=world),
            seed=suite.seed,
            batch=suite.batch,
        )
        _ = drawing.calls  # read now: a set that cannot be read fails here, on all ranks
        return _Exam(
            drawing=drawing,
            judge=judge,
            labels=labels,
            real_features=features.cpu(),
            real_labels=real_labels,
            shown=shown,
            about=Evaluation(
                real={"accuracy": judge.accuracy, "frechet": judge.frechet},
                captions=[drawing.prompt(image).caption for image in shown],
                reals=reals[[image % len(reals) for image in shown]],
            ),
        )

    def generate(self, velocity: Velocity, sampler: Sampler) -> tuple[Tensor, float]:
        """Generate this rank's images, and say how many seconds each took."""
        mine, seconds = self.drawing.latents(velocity, sampler)
        return mine.clamp(-1, 1), seconds

    def score(self, mine: Float[Tensor, "mine c h w"]) -> dict[str, float]:
        """Score all ranks' images; collective."""
        with torch.no_grad():
            logits, features = (self.drawing.deal.collect(part).cpu() for part in self.judge(mine))
        return {
            "accuracy": metrics.accuracy(logits, self.labels),
            "frechet": metrics.frechet(features, self.real_features),
            "diversity": metrics.diversity(
                features, self.labels, self.real_features, self.real_labels
            ),
        }

    def picture(self, mine: Float[Tensor, "mine c h w"]) -> Float[Tensor, "rows c h w"]:
        """Bring together the images of the picture; collective."""
        return self.drawing.deal.collect(mine)[self.shown].cpu()
