"""Scores of pictures on disk: features by all processes, numbers from them on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.encoding.pictures import SUFFIXES
from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.evals.deal import Deal
from twinflow_train.evals.grid import picture
from twinflow_train.evals.judge import Judge, labelled
from twinflow_train.evaluate.drawing import PICTURES, cut
from twinflow_train.evaluate.settings import Evaluating
from twinflow_train.evaluate.suites import Judged, Prompt, Suite
from twinflow_train.files import sha256, whole_file
from twinflow_train.models.codec import Codec
from twinflow_train.models.features import FeatureNet, TextNet
from twinflow_train.rng import generator

AT_ONCE = 16
"""Pictures that a feature network sees together, always so many."""


@dataclass(kw_only=True)
class Scorer:
    """A network, what it says of real pictures and of prompts, and how to score others.

    real: features of real pictures, None where there are none to compare with.
    """

    suite: Suite
    prompts: Sequence[Prompt]
    net: FeatureNet
    world: World
    real: Float[Tensor, "reals features"] | None

    def scores(self, folder: Path) -> dict[str, float]:
        """Score an entry's pictures; the same on every rank; collective."""
        order = [(p, image) for p in self.prompts for image in range(self.suite.images)]

        def read(number: int) -> Image.Image:
            prompt, image = order[number]
            return self.suite.read(folder / PICTURES, prompt, image)

        found = features(self.net, read, len(order), self.world)
        scores: dict[str, float] = {}
        if self.real is not None:
            kernel = metrics.kernel_distance(found, self.real)
            scores = {"frechet": metrics.frechet(found, self.real)}
            scores |= {"kernel": kernel.value, "kernel_error": kernel.error}
            scores |= asdict(metrics.neighbourhood(found, self.real))
        if self.suite.images > 1:
            by_prompt = found.unflatten(0, (len(self.prompts), self.suite.images))
            scores["seed_diversity"] = metrics.seed_diversity(by_prompt)
        if isinstance(self.net, TextNet):
            texts = torch.cat(
                [self.net.texts([p.text for p in some]) for some in cut(self.prompts, AT_ONCE)]
            )
            scores["clip_score"] = metrics.clip_score(
                found, texts.repeat_interleave(self.suite.images, dim=0)
            )
        return scores | self._judged(found)

    def reached(self) -> dict[str, float]:
        """Return what real pictures reach.

        frechet: between two halves of them, so that it holds the bias of few pictures.
        frechet_bias: what `metrics.frechet_bias` says that it is with as many pictures as were
        drawn.
        """
        if self.real is None or len(self.real) < 4:
            return {}
        mixed = self.real[torch.randperm(len(self.real), generator=generator("halves"))]
        drawn = len(self.prompts) * self.suite.images
        one, two = mixed[::2], mixed[1::2]
        return {
            "images": len(self.real),
            "frechet": metrics.frechet(one, two),
            "kernel": metrics.kernel_distance(one, two).value,
            "frechet_bias": metrics.frechet_bias(self.real, drawn, len(self.real)),
        } | asdict(metrics.neighbourhood(one, two))

    def _judged(self, found: Float[Tensor, "n features"]) -> dict[str, float]:
        """Add what only the judge says."""
        if not isinstance(self.net, JudgeNet) or self.real is None:
            return {}
        labels = torch.tensor([p.about["label"] for p in self.prompts])
        labels = labels.repeat_interleave(self.suite.images)
        return {
            "accuracy": metrics.accuracy(self.net.judge.head(found), labels),
            "diversity": metrics.diversity(found, labels, self.real, self.net.labels),
        }


@dataclass(kw_only=True)
class JudgeNet(FeatureNet):
    """A set's classifier as a feature network. labels: of the real images."""

    judge: Judge
    labels: Tensor

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "b 64"]:
        """Return the judge's features of pictures of its size."""
        channels, high, wide = self.judge.shape
        rows = []
        for one in pictures:
            if one.size != (wide, high):
                raise UserError(
                    f"suite.judge judges pictures of {wide}x{high} pixels, the model draws "
                    f"{one.size[0]}x{one.size[1]}"
                )
            pixels = torch.from_numpy(np.array(one.convert("L" if channels == 1 else "RGB")))
            rows.append(pixels.view(high, wide, channels).permute(2, 0, 1).float() / 127.5 - 1)
        found: Tensor = self.judge(torch.stack(rows))[1]
        return found


def scorer(
    settings: Evaluating,
    prompts: Sequence[Prompt],
    world: World,
    codec: Callable[[], Codec],
) -> Scorer | None:
    """Load what judges, and look at the real pictures; None if nothing judges; collective.

    codec: loads what decodes latents, wanted for real pictures in shards alone.
    """
    suite = settings.suite
    if isinstance(suite, Judged) and settings.features is None:
        images, labels = labelled(ShardSet(suite.heldout, option="suite.heldout"))
        net = JudgeNet(judge=Judge.load(suite.judge), labels=labels)
        with torch.no_grad():
            real: Tensor | None = net.judge(images)[1]
        return Scorer(suite=suite, prompts=prompts, net=net, world=world, real=real)
    if settings.features is None:
        return None
    chosen = settings.features.open(world.device)
    real = None
    if settings.real is not None:
        files = _real_files(settings, world, codec)
        real = features(chosen, lambda number: _opened(files[number]), len(files), world)
    return Scorer(suite=suite, prompts=prompts, net=chosen, world=world, real=real)


def features(
    net: FeatureNet, read: Callable[[int], Image.Image], count: int, world: World
) -> Float[Tensor, "count features"]:
    """Return the features of numbered pictures, on the CPU of every rank; collective.

    Chunks are equally large and the same whatever the number of ranks, so nothing depends on it.
    """
    deal = Deal(count=-(-count // AT_ONCE), world=world)
    parts = []
    for chunk in deal.mine:
        numbers = [min(chunk * AT_ONCE + k, count - 1) for k in range(AT_ONCE)]
        parts.append(net.images([read(number) for number in numbers]))
    mine = torch.stack(parts).to(world.device)
    return deal.collect(mine).flatten(0, 1)[:count].cpu()


def _real_files(settings: Evaluating, world: World, codec: Callable[[], Codec]) -> list[Path]:
    """List real pictures; those in shards are decoded once, and kept beside the results."""
    where = Path(settings.real or "")
    if (where / "manifest.json").is_file():
        # Named by what they are: another set's pictures are never taken for these.
        name = f"real-{sha256(where / 'manifest.json')[:8]}"
        where = _decoded(where, Path(settings.folder) / name, world, codec)
    found = sorted(p for p in where.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(
            f"real: {where} holds no pictures ({', '.join(SUFFIXES)}) and is no set of shards"
        )
    return found


def _decoded(where: Path, folder: Path, world: World, codec: Callable[[], Codec]) -> Path:
    """Decode a set's latents to pictures, dealt to ranks."""
    shards = ShardSet(where, option="real")
    if not shards.manifest.form.has_latents:
        raise UserError(f"real: {where} holds prompts alone, and no pictures to compare with")
    mine = range(world.rank, len(shards), world.size)
    missing = [n for n in mine if not (folder / f"{n:06d}.png").is_file()]
    if missing:
        decoder = codec()
        for number in missing:
            latent = shards.read(number).image.float()[None].to(world.device)
            with torch.no_grad():
                shown = picture(decoder.decode(latent)[0].cpu())
            with whole_file(folder / f"{number:06d}.png") as unfinished:
                shown.save(unfinished, format="PNG")
    world.barrier()
    return folder


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise UserError(f"real: {file} cannot be read ({error})") from error
