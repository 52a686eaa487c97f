from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.evals import digits
from tests.evals.conftest import Real
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.evals.judge import Judge, fit_judge, labelled


def test_it_knows_held_out_digits_and_says_how_well(real: Real) -> None:
    judge = Judge.load(real.judge)
    images, labels = labelled(real.heldout)
    logits, features = judge(images)
    assert logits.shape == (500, 10)
    assert features.shape == (500, 64)
    assert metrics.accuracy(logits, labels) == real.accuracy == judge.accuracy
    assert real.accuracy > 0.97
    assert 0 < judge.frechet < 3
    assert real.seconds < 60


def test_an_image_is_judged_alone(real: Real) -> None:
    judge = Judge.load(real.judge)
    images, _ = labelled(real.heldout)
    torch.testing.assert_close(judge(images[:7])[0], judge(images)[0][:7])


def test_the_same_data_give_the_same_judge_and_global_randomness_is_left_alone(
    tmp_path: Path,
) -> None:
    few = digits.write(tmp_path / "few", slice(0, None, 50))
    state = torch.get_rng_state()
    files = [tmp_path / "a.safetensors", tmp_path / "made" / "b.safetensors"]
    for path in files:
        fit_judge(train=few, heldout=few, path=path)
        torch.rand(1)
    torch.set_rng_state(state)
    fit_judge(train=few, heldout=few, path=files[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in files[1].parent.iterdir()] == ["b.safetensors"]


def test_a_judge_has_the_shape_and_the_classes_of_its_set(tmp_path: Path) -> None:
    train = digits.write_tinted(tmp_path / "train", slice(1, 2500, 10))  # digits 0 to 4
    heldout = digits.write_tinted(tmp_path / "heldout", slice(0, 2500, 20))
    path = tmp_path / "judge.safetensors"
    assert fit_judge(train=train, heldout=heldout, path=path) > 0.8
    judge = Judge.load(path)
    assert (judge.shape, judge.classes) == ((3, 32, 32), 5)
    images, labels = labelled(heldout)
    logits, features = judge(images)
    assert (logits.shape, features.shape) == ((125, 5), (125, 64))
    assert metrics.accuracy(logits, labels) == judge.accuracy


def test_a_judge_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evals\.judge: .*python data/digits\.py"):
        Judge.load(tmp_path / "none.safetensors")
    (tmp_path / "broken").write_bytes(b"not a judge")
    with pytest.raises(UserError, match=r"evals\.judge: .* is not a judge"):
        Judge.load(tmp_path / "broken")


def test_data_without_labels_are_refused(tmp_path: Path) -> None:
    sample = Sample(
        key="a", latent=torch.zeros(1, 28, 28), texts=[torch.zeros(1, 4)], captions=["one"]
    )
    about = About(encoder="e", revision="1", null_prompt="", licence="test")
    shards = write_shards(tmp_path / "set", [sample], null=torch.zeros(1, 4), about=about)
    with pytest.raises(UserError, match="sample a has no field `label`"):
        labelled(shards)
