from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.evals import digits
from tests.evals.conftest import Real
from tests.helpers import spawn
from twinflow_train.batch import Condition
from twinflow_train.data.shards import ShardSet
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals.results import Evaluation
from twinflow_train.evals.suite import Judged, NoEvals
from twinflow_train.flow.sampler import Sampler, Style

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SAMPLERS = [
    Sampler(),
    Sampler(steps=2, end_gap=0.6),
    Sampler(steps=2, stochasticity=1.0, end_gap=0.6),
    Sampler(steps=3, style=Style.multi, guidance=2.0),
]


def run(world: World, heldout: Path, judge: str, batch: int) -> Evaluation:
    """Try two networks on 37 images, which no number of ranks above one divides."""
    suite = Judged(images=37, batch=batch, judge=judge)
    networks = {"raw": digits.Linear.make(0), "ema": digits.Linear.make(1)}
    return suite.evaluate(networks, SAMPLERS, ShardSet(heldout), world)


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert [r.key for r in found.results] == [r.key for r in expected.results]
    assert found.captions == expected.captions
    for here, there in zip(found.results, expected.results, strict=True):
        for score in ("accuracy", "frechet", "diversity"):
            assert here.scores[score] == pytest.approx(there.scores[score], rel=1e-4), here.key
    for key, images in expected.pictures.items():
        torch.testing.assert_close(found.pictures[key], images, atol=1e-5, rtol=1e-5)


def test_class_means_are_recognised_but_neither_varied_nor_near(real: Real) -> None:
    suite = Judged(images=500, judge=str(real.judge))
    means = digits.ToMeans(digits.class_means())
    found = suite.evaluate({"base": means}, [Sampler(start_gap=0.0)], real.heldout, ALONE)
    (result,) = found.results
    assert (result.model, result.nfe, result.style) == ("base", 1, "few")
    assert result.scores["accuracy"] > 0.7
    assert result.scores["diversity"] < 1e-3
    assert result.scores["frechet"] > 10 * found.real["frechet"]
    assert result.scores["seconds_per_image"] > 0
    assert found.real["accuracy"] == real.accuracy
    torch.testing.assert_close(
        found.pictures["base/nfe1"], digits.class_means(), atol=1e-4, rtol=1e-4
    )


def test_the_picture_has_one_prompt_of_each_class_and_its_real_image(real: Real) -> None:
    found = run(ALONE, real.heldout.folder, str(real.judge), 8)
    # The held-out digits come in order of class, so 37 images show only zeros.
    assert len(found.captions) == 1
    assert "zero" in found.captions[0]
    assert found.reals is not None
    assert torch.equal(found.reals[0], real.heldout.read(0).image)
    assert [column.heading.split("\n")[0] for column in found.columns()[:2]] == ["real", "raw"]


def test_all_networks_and_samplers_get_the_same_noise_and_prompts(real: Real) -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def spy(name: str) -> digits.Spy:
        return digits.Spy(seen[name])

    suite = Judged(images=6, batch=4, judge=str(real.judge))
    suite.evaluate({"a": spy("a"), "b": spy("b")}, SAMPLERS[:1], real.heldout, ALONE)
    assert [len(call) for call in seen["a"]] == [4, 2]
    assert all(torch.equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))
    again = Judged(images=6, batch=6, judge=str(real.judge), seed=1)
    again.evaluate({"b": spy("b")}, SAMPLERS[:1], real.heldout, ALONE)
    assert not torch.equal(seen["b"][-1][0], seen["a"][0][0])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_the_results(real: Real, ranks: int) -> None:
    alone = run(ALONE, real.heldout.folder, str(real.judge), 16)
    found = spawn(run, ranks, real.heldout.folder, str(real.judge), 8)
    for one in found:
        assert_same(one, alone)
    assert [one.metrics() for one in found] == [found[0].metrics()] * ranks


def test_a_network_that_fell_apart_is_scored_not_raised(real: Real, tmp_path: Path) -> None:
    def broken(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        return x_t * math.nan

    suite = Judged(images=20, judge=str(real.judge))
    found = suite.evaluate({"raw": broken}, [Sampler()], real.heldout, ALONE)
    scores = found.results[0].scores
    assert scores["accuracy"] == 0
    assert math.isnan(scores["frechet"])
    found.save(tmp_path)
    assert math.isnan(Evaluation.load(tmp_path).results[0].scores["frechet"])


def test_no_evaluation_finds_nothing(real: Real) -> None:
    found = NoEvals().evaluate({"raw": digits.Linear.make(0)}, [], real.heldout, ALONE)
    assert found.metrics() == {}


def test_it_is_its_own_configuration() -> None:
    config = OmegaConf.merge(
        OmegaConf.structured(Judged),
        {"images": 20, "samplers": [{"steps": 2, "stochasticity": 1.0}], "base": [
            {"steps": 30, "style": "multi", "kumaraswamy": [1.17, 0.8, 1.1]}]},
    )  # fmt: skip
    suite = OmegaConf.to_object(config)
    assert isinstance(suite, Judged)
    assert suite.samplers == [Sampler(steps=2, stochasticity=1.0)]
    assert suite.base[0].nfe == 30


@pytest.mark.parametrize("key", ["images", "batch", "rows"])
def test_counts_below_one_are_refused(key: str) -> None:
    option: dict[str, Any] = {key: 0}
    with pytest.raises(UserError, match=rf"evals\.{key} is 0"):
        Judged(**option)


def test_samplers_that_would_share_a_name_are_refused() -> None:
    same = [Sampler(steps=2, end_gap=0.6), Sampler(steps=2, end_gap=0.5)]
    with pytest.raises(UserError, match=r"evals\.base has two samplers named nfe2;"):
        Judged(base=same)


def test_a_missing_judge_and_other_images_are_one_clear_line(real: Real, tmp_path: Path) -> None:
    suite = Judged(images=2, judge=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"evals\.judge"):
        suite.evaluate({}, [], real.heldout, ALONE)
    wide = digits.write_wide(tmp_path / "wide")
    with pytest.raises(UserError, match=r"of shape \(1, 28, 28\), the data have \(1, 32, 32\)"):
        Judged(images=2, judge=str(real.judge)).evaluate({}, [], wide, ALONE)
