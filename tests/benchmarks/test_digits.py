"""The digit benchmark, at toy length on made-up digits: fair, complete, and able to go on."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import digits, mnist
from benchmarks.digits import METHODS, SAMPLERS, Training, main
from benchmarks.mnist import Digits, save_digits, small
from benchmarks.unet import NULL, unet
from twinflow_train.batch import Condition
from twinflow_train.rng import generator


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write digits that are one smooth blob a class with some noise: 18 a class to train on."""
    monkeypatch.setattr(mnist, "EPOCHS", 1)
    monkeypatch.setattr(digits, "PER_CLASS", 2)
    draws = generator("toy digits")
    blobs = torch.nn.functional.interpolate(torch.rand(10, 1, 4, 4, generator=draws), size=28)[:, 0]
    classes = torch.arange(10).repeat_interleave(118)
    noise = torch.rand(len(classes), 28, 28, generator=draws)
    images = (200 * blobs[classes] + 50 * noise).to(torch.uint8)
    save_digits(tmp_path / "digits.safetensors", images, classes)
    return tmp_path


def test_a_short_run_writes_a_row_for_each_method_and_a_later_one_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "digits.json"
    arguments = ["--seconds", "0.2", "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--seeds", "1"]) == 0
    first = json.loads(out.read_text())
    assert [row["method"] for row in first["rows"]] == list(METHODS)
    for row in first["rows"]:
        assert row["steps"] >= 1
        assert 0.2 <= row["cpu_seconds"] < 5
        for weights in ("raw", "average"):
            assert set(row[weights]) == set(SAMPLERS)
            for scores in row[weights].values():
                assert 0 <= scores["accuracy"] <= 1
                assert scores["frechet"] > 0
    assert set(first["machine"]) == {"platform", "cpus", "torch", "date"}
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in METHODS)

    assert main([*arguments, "--seeds", "2"]) == 0
    second = json.loads(out.read_text())
    assert second["rows"][: len(METHODS)] == first["rows"]
    assert [row["seed"] for row in second["rows"]] == [0] * len(METHODS) + [1] * len(METHODS)

    assert main(["--seconds", "0.3", "--data", str(data), "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert json.loads(out.read_text()) == second


def test_methods_start_from_the_same_weights_and_see_the_same_data(data: Path) -> None:
    torch.set_num_threads(1)
    real = Digits.read(data)
    trainings = [Training(make(), real, seed=1) for make in METHODS.values()]
    for _ in range(3):
        batches = [training.batch() for training in trainings]
        for batch in batches[1:]:
            assert torch.equal(batch.data, batches[0].data)
            assert torch.equal(batch.cond.tokens, batches[0].cond.tokens)
        for training in trainings:
            training.advance(training.cpu_seconds + 1e-6)
    assert [training.steps for training in trainings] == [3] * len(trainings)


def test_weights_are_a_function_of_the_seed_and_move_when_trained(data: Path) -> None:
    training = Training(METHODS["ours"](), Digits.read(data), seed=2)
    for name, weight in unet(2).state_dict().items():
        assert torch.equal(weight, training.student.state_dict()[name])
    training.advance(0.1)
    assert any(
        not torch.equal(weight, training.student.state_dict()[name])
        for name, weight in unet(2).state_dict().items()
    )


def test_the_second_time_vanishes_on_the_diagonal_and_matters_off_it() -> None:
    net, other = unet(0), unet(0)
    for weight in other.then.parameters():
        weight.data.fill_(1)
    x, t = torch.randn(4, 1, 16, 16, generator=generator("x")), torch.full((4,), 0.6)
    cond = Condition(tokens=torch.tensor([0.0, 1.0, 2.0, NULL])[:, None, None])
    with torch.no_grad():
        assert torch.equal(net(x, t, t, cond), other(x, t, t, cond))
        assert torch.equal(net(x, -t, -t, cond), other(x, -t, -t, cond))
        assert not torch.equal(net(x, t, 0 * t, cond), other(x, t, 0 * t, cond))
        assert not torch.equal(net(x, t, t, cond), net(x, -t, -t, cond))
        assert not torch.equal(net(x, t, t, cond), net(x, t, t, cond[torch.tensor([1, 2, 3, 0])]))


def test_digits_are_made_small_by_padding_and_averaging() -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 0, 0] = 255
    found = small(image)
    assert found.shape == (1, 1, 16, 16)
    assert float(found[0, 0, 1, 1]) == pytest.approx(-0.5)
    assert float(found.sum()) == pytest.approx(-255.5)
    assert float(found.min()) == -1


def test_held_out_digits_are_a_hundred_of_each_class(data: Path) -> None:
    real = Digits.read(data)
    assert real.heldout_classes.bincount().tolist() == [100] * 10
    assert real.train_classes.bincount().tolist() == [18] * 10
