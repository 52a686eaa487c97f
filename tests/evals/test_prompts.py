"""Held-out prompts drawn inside a run, decoded by a VAE alone; and evaluations that fail."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evals import digits
from tests.helpers import spawn
from tests.pipelines.features import write_clip, write_dinov2
from tests.pipelines.qwen_image import write_pipeline
from twinflow_train.batch import Condition
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals.during import evaluate
from twinflow_train.evals.health import Health
from twinflow_train.evals.prompts import Prompts
from twinflow_train.evals.results import Evaluation
from twinflow_train.evals.suite import Evals, Judged, Networks
from twinflow_train.flow.sampler import Sampler, Style
from twinflow_train.models.codec import Encoders
from twinflow_train.models.qwen_codec import QwenImageEncoders

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
SHAPE = (16, 4, 6)
SAMPLERS = [Sampler(), Sampler(steps=2, stochasticity=1.0, end_gap=0.6)]
ABOUT = About(encoder="tiny", revision="sha256:0", null_prompt="", licence="test")


@dataclass(frozen=True)
class Moves:
    """A velocity in which noise and prompt matter."""

    by: float

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        mask = cond.full_mask().to(x_t).unsqueeze(-1)  # padding is no word
        word = (cond.tokens.float() * mask).sum((1, 2)).view(-1, 1, 1, 1) / 10
        return self.by * x_t + word + (t - r).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class There:
    """A held-out set with latents, a pipeline around its VAE, and feature networks."""

    heldout: ShardSet
    pipeline: Path
    clip: Path
    dinov2: Path


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> There:
    folder = tmp_path_factory.mktemp("prompts")
    draws = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            key=f"{n:04d}",
            latent=torch.randn(SHAPE, generator=draws),
            texts=[torch.randn(3, 16, generator=draws)],
            captions=[f"prompt {n}"],
            fields={},
        )
        for n in range(9)
    ]
    shards = write_shards(folder / "heldout", samples, null=torch.zeros(1, 16), about=ABOUT)
    return There(
        heldout=shards,
        pipeline=write_pipeline(folder / "tiny"),
        clip=write_clip(folder / "clip"),
        dinov2=write_dinov2(folder / "dinov2"),
    )


def run(world: World, heldout: Path, options: dict[str, Any]) -> Evaluation:
    """Try two networks on 7 prompts, which no number of ranks above one divides."""
    suite = Prompts(images=7, batch=2, rows=3, **options)
    networks = {"raw": Moves(0.3), "ema": Moves(0.5)}
    return suite.evaluate(networks, SAMPLERS, ShardSet(heldout), world)


def test_pictures_are_decoded_as_the_whole_codec_decodes(there: There) -> None:
    found = run(ALONE, there.heldout.folder, {"decoder": str(there.pipeline)})
    assert found.captions == ["prompt 0", "prompt 1", "prompt 2"]
    assert list(found.pictures) == ["raw/nfe1", "raw/nfe2-s1", "ema/nfe1", "ema/nfe2-s1"]
    encoders: Encoders = QwenImageEncoders(path=str(there.pipeline))
    codec = encoders.open(encoders.find(), CPU)
    latents = torch.stack([there.heldout.read(n).image.float() for n in range(3)])
    assert found.reals is not None
    torch.testing.assert_close(found.reals, codec.decode(latents).clamp(-1, 1), atol=1e-5, rtol=0)
    assert found.reals.shape == (3, 3, 32, 48)
    scores = found.results[0].scores
    assert set(scores) == {"seconds_per_image"}
    assert scores["seconds_per_image"] > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_the_results(there: There, ranks: int) -> None:
    folder, options = there.heldout.folder, {"decoder": str(there.pipeline)}
    options |= {"features": str(there.clip)} if ranks == 4 else {}
    alone = run(ALONE, folder, options)
    for one in spawn(run, ranks, folder, options):
        assert one.captions == alone.captions
        for here, wanted in zip(one.results, alone.results, strict=True):
            assert here.key == wanted.key
            for score in wanted.scores.keys() - {"seconds_per_image"}:
                assert here.scores[score] == pytest.approx(wanted.scores[score], rel=1e-3, abs=1e-5)
        for key, images in alone.pictures.items():
            torch.testing.assert_close(one.pictures[key], images, atol=1e-5, rtol=1e-5)


def test_pixels_need_no_decoder_and_other_latents_do(there: There, tmp_path: Path) -> None:
    pixels = digits.write(tmp_path / "digits", slice(0, 5000, 500))
    Prompts().check(pixels)
    found = Prompts(images=3, features=str(there.dinov2)).evaluate(
        {"raw": digits.Linear.make(0)}, SAMPLERS[:1], pixels, ALONE
    )
    assert found.reals is not None
    torch.testing.assert_close(found.reals[0], pixels.read(0).image.expand(3, -1, -1))
    assert found.results[0].scores["frechet"] > 0
    with pytest.raises(UserError, match=r"evals\.decoder: data\.heldout was encoded with tiny"):
        Prompts().check(there.heldout)
    with pytest.raises(UserError, match=r"evals\.decoder: .* has no VAE"):
        Prompts(decoder=str(tmp_path)).check(there.heldout)
    with pytest.raises(UserError, match=r"evals\.features"):
        Prompts(decoder=str(there.pipeline), features="/nowhere").check(there.heldout)


@pytest.mark.parametrize("key", ["images", "batch", "rows"])
def test_counts_below_one_are_refused(key: str) -> None:
    option: dict[str, Any] = {key: 0}
    with pytest.raises(UserError, match=rf"evals\.{key} is 0"):
        Prompts(**option)


# Inside a run


def during(world: World, suite: Evals, heldout: ShardSet, folder: Path, step: int = 0) -> Any:
    ask = Moves(0.5)
    return evaluate(
        suite, {"raw": Moves(0.3), "ema": ask}, base=ask, heldout=heldout, folder=folder,
        health=Health(student=ask, teacher=ask, delta=0.01, order=1, dtype=torch.float32),
        step=step, world=world,
    )  # fmt: skip


def test_the_gap_to_the_base_is_measured_on_the_same_noise(there: There, tmp_path: Path) -> None:
    base = [Sampler(steps=4, style=Style.multi), Sampler()]
    suite = Prompts(samplers=SAMPLERS, base=base, images=6, decoder=str(there.pipeline),
                    features=str(there.dinov2))  # fmt: skip
    first = during(ALONE, suite, there.heldout, tmp_path)
    later = during(ALONE, suite, there.heldout, tmp_path, step=5)
    for found in (first, later):
        values = found.metrics()
        best = min(r.scores["frechet"] for r in found.evaluation.results if r.model == "base")
        assert values["eval/nfe1/gap"] == pytest.approx(values["eval/ema/nfe1/frechet"] - best)
        assert values["eval/nfe1/distance"] > 0
        assert (values["eval/failed"], values["time/eval"] > 0) == (0, True)
        assert found.picture.is_file()
        assert "eval/base/nfe1/frechet" not in values
    pictures = later.evaluation.pictures
    apart = (pictures["ema/nfe1"] - pictures["base/nfe4-multi"]).square().mean().sqrt()
    assert later.metrics()["eval/nfe1/distance"] == pytest.approx(float(apart))


def test_an_evaluation_that_fails_is_counted_and_not_raised(
    there: There, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suite = Judged(samplers=SAMPLERS, judge=str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING):
        found = during(ALONE, suite, there.heldout, tmp_path)
    values = found.metrics()
    assert values["eval/failed"] == 1
    assert not any(math.isnan(value) for value in values.values())
    assert "training goes on" in caplog.text
    assert str(tmp_path / "none") in caplog.text


@dataclass(kw_only=True)
class OneRankBreaks(Prompts):
    """Cannot read its set on rank 1."""

    def vae(self, heldout: ShardSet) -> Path | None:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise OSError("rank 1 has lost the disk")
        return super().vae(heldout)


def breaks(world: World, heldout: Path, pipeline: str, folder: Path) -> tuple[float, float]:
    """Evaluate with a rank that fails, then train on: a collective that all take."""
    suite = OneRankBreaks(samplers=SAMPLERS, images=4, decoder=pipeline)
    found = during(world, suite, ShardSet(heldout), folder)
    told = world.sum(torch.tensor(float(world.rank)))
    return found.metrics()["eval/failed"], float(told)


def test_a_rank_that_fails_fails_the_evaluation_on_all(there: There, tmp_path: Path) -> None:
    found = spawn(breaks, 2, there.heldout.folder, str(there.pipeline), tmp_path)
    assert found == [(1, 1), (1, 1)]


def test_networks_are_asked_in_the_same_order(there: There) -> None:
    networks: Networks = {"raw": Moves(0.1)}
    suite = Prompts(images=2, decoder=str(there.pipeline))
    one, two = (suite.evaluate(networks, SAMPLERS, there.heldout, ALONE) for _ in range(2))
    assert all(torch.equal(one.pictures[key], two.pictures[key]) for key in one.pictures)
