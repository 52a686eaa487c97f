"""Held-out prompts of real families, drawn inside a run and decoded to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.evals.agreed import agreed
from twinflow_train.evals.deal import Deal
from twinflow_train.evals.drawing import Drawing
from twinflow_train.evals.grid import picture
from twinflow_train.evals.results import Evaluation, Result
from twinflow_train.evals.suite import Evals, Networks
from twinflow_train.flow.sampler import Sampler
from twinflow_train.models.decoder import Decoder, find_vae, open_decoder, pixels
from twinflow_train.models.features import FeatureNet, TextNet, features_at
from twinflow_train.models.hub import REPOSITORY


@dataclass(kw_only=True)
class Prompts(Evals):
    """Pictures of held-out prompts, all networks and samplers on the same prompts and noise.

    Prompts were encoded with the set; of its encoders the decoder alone is loaded, for as long as
    an evaluation takes.

    images: for each network and sampler, of as many held-out prompts; distances of other numbers do
    not compare. batch: images of one network call on one rank. rows: prompts in the picture.
    decoder: a diffusers pipeline folder, its VAE's or REPOSITORY@REVISION; null is the one that the
    held-out set was encoded with, or none where latents are pixels.
    features: a folder of DINOv2 or CLIP, or Inception's file, to compare pictures in with the
    held-out ones; null compares none. seed: of noise, and of which captions are taken.
    """

    images: int = 8
    batch: int = 4
    rows: int = 8
    decoder: str | None = None
    features: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in {"images": self.images, "batch": self.batch, "rows": self.rows}.items():
            if value < 1:
                raise UserError(f"evals.{key} is {value}; it must be at least 1")

    def check(self, heldout: ShardSet) -> None:
        """Refuse sets of several sizes, and a decoder or features that are not there: UserError."""
        _ = heldout.latent_shape
        self.vae(heldout)
        if self.features is not None:
            features_at(self.features).check()

    def vae(self, heldout: ShardSet) -> Path | None:
        """Find the decoder's folder; None where latents are pixels."""
        if self.decoder is not None:
            return find_vae(self.decoder, key="evals.decoder")
        if heldout.latent_shape[0] in (1, 3):
            return None
        about = heldout.manifest.about
        if not REPOSITORY.fullmatch(about.encoder):
            raise UserError(
                f"evals.decoder: data.heldout was encoded with {about.encoder}, a folder that may "
                "be anywhere: give evals.decoder=FOLDER of that pipeline"
            )
        commit = "" if about.revision.startswith("sha256:") else f"@{about.revision}"
        return find_vae(about.encoder + commit, key="evals.decoder")

    def evaluate(
        self, networks: Networks, samplers: Sequence[Sampler], heldout: ShardSet, world: World
    ) -> Evaluation:
        """Draw, decode and, with features, compare; scores: seconds_per_image, frechet, kernel.

        With CLIP also clip_score. seconds_per_image is that of the network alone.
        """
        exam = _Gallery.prepare(self, heldout, world)
        results, pictures = [], {}
        for model, velocity in networks.items():
            for sampler in samplers:
                latents, seconds = exam.drawing.latents(velocity, sampler)
                shown = agreed(world, partial(exam.decoded, latents))
                scores = exam.scores(shown) | {"seconds_per_image": seconds}
                result = Result.of(model, sampler, scores)
                results.append(result)
                pictures[result.key] = exam.picture(shown)
        return replace(exam.about, results=results, pictures=pictures)


@dataclass(kw_only=True)
class _Gallery:
    """What one evaluation holds ready.

    real: features of the held-out pictures, None where nothing is compared.
    """

    suite: Prompts
    drawing: Drawing
    decode: Decoder
    net: FeatureNet | None
    real: Float[Tensor, "images features"] | None
    about: Evaluation

    @staticmethod
    def prepare(suite: Prompts, heldout: ShardSet, world: World) -> _Gallery:
        """Load the decoder and the features, and look at the held-out pictures; collective."""
        gallery = agreed(world, lambda: _Gallery.opened(suite, heldout, world))
        if heldout.manifest.form.has_latents:
            reals = agreed(world, gallery.held_out)
            gallery.about.reals = gallery.picture(reals)
            gallery.real = gallery.featured(reals) if gallery.net else None
        return gallery

    @staticmethod
    def opened(suite: Prompts, heldout: ShardSet, world: World) -> _Gallery:
        """Load the decoder and the features, and read the prompts."""
        folder = suite.vae(heldout)
        drawing = Drawing(
            heldout=heldout,
            deal=Deal(count=suite.images, world=world),
            seed=suite.seed,
            batch=suite.batch,
        )
        shown = range(min(suite.rows, suite.images))
        _ = drawing.calls  # read now: a set that cannot be read fails here, on all ranks
        return _Gallery(
            suite=suite,
            drawing=drawing,
            decode=open_decoder(folder, world.device) if folder else pixels,
            net=features_at(suite.features).open(world.device) if suite.features else None,
            real=None,
            about=Evaluation(captions=[drawing.prompt(number).caption for number in shown]),
        )

    def held_out(self) -> Float[Tensor, "mine 3 h w"]:
        """Decode this rank's held-out pictures."""
        mine = [self.drawing.prompt(number).image.float() for number in self.drawing.deal.mine]
        return self.decoded(torch.stack(mine).to(self.drawing.deal.world.device))

    def decoded(self, latents: Float[Tensor, "mine c hl wl"]) -> Float[Tensor, "mine 3 h w"]:
        """Decode this rank's latents, one at a time: a large picture takes gigabytes."""
        return torch.cat([self.decode(latent[None]).clamp(-1, 1).cpu() for latent in latents])

    def featured(self, shown: Float[Tensor, "mine 3 h w"]) -> Float[Tensor, "images features"]:
        """Return the features of all ranks' pictures; collective."""
        net, world = self.net, self.drawing.deal.world
        assert net is not None
        mine = agreed(world, lambda: torch.cat([net.images([picture(one)]) for one in shown]))
        return self.drawing.deal.collect(mine.to(world.device)).cpu()

    def scores(self, shown: Float[Tensor, "mine 3 h w"]) -> dict[str, float]:
        """Compare all ranks' pictures with held-out ones, and with their prompts; collective."""
        if self.net is None:
            return {}
        found, scores = self.featured(shown), {}
        if self.real is not None:
            scores["frechet"] = metrics.frechet(found, self.real)
            scores["kernel"] = metrics.kernel_distance(found, self.real).value
        if isinstance(self.net, TextNet):
            texts = [self.drawing.prompt(number).caption for number in range(self.suite.images)]
            scores["clip_score"] = metrics.clip_score(found, self.net.texts(texts))
        return scores

    def picture(self, shown: Float[Tensor, "mine 3 h w"]) -> Float[Tensor, "rows 3 h w"]:
        """Bring together the pictures of the first prompts; collective."""
        world, rows = self.drawing.deal.world, min(self.suite.rows, self.suite.images)
        # Images are dealt in turns: the first of each rank are the first of all.
        first = shown[: -(-rows // world.size)].to(world.device)
        return world.gather(first).transpose(0, 1).flatten(0, 1)[:rows].cpu()
