"""The toy of method.md: its tools are right, its figures come out, and its page names real code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from docs import plot, toy
from twinflow_train.batch import Condition, Times

TOP = Path(__file__).parent.parent.parent
PAGE = TOP / "docs" / "method.md"
FIGURES = ("method_delta_v.png", "method_few_steps.png", "method_sides.png")


class Made(NamedTuple):
    """What a short run leaves."""

    out: Path
    networks: toy.Networks
    rows: dict[str, list[plot.Cell]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Train for a few seconds and draw."""
    out = tmp_path_factory.mktemp("figures")
    networks = toy.train_all(base_steps=120, few_steps=101)
    rows = toy.rows_of(networks)
    toy.draw(networks, rows, out)
    return Made(out, networks, rows)


def test_a_short_training_brings_one_step_near_the_data(made: Made) -> None:
    rows, base = made.rows, made.rows["base"][0].distance
    assert base > 0.8
    assert set(rows) == {"base", "recursion only", "adversary only", "TwinFlow"}
    assert rows["TwinFlow"][0].distance < base / 3
    assert rows["recursion only"][0].distance < base / 3


def test_the_adversary_sees_less_to_mend_as_training_goes_on(
    made: Made,
) -> None:
    sizes = made.networks.few["TwinFlow"].delta_v
    assert sum(sizes[-20:]) < 0.8 * sum(sizes[:20])
    assert not any(made.networks.few["recursion only"].delta_v)


def test_the_figures_are_small_pictures_on_white(made: Made) -> None:
    written = sorted(path.name for path in made.out.iterdir())
    assert written == sorted(FIGURES)
    for path in [*made.out.iterdir(), *(TOP / "docs" / name for name in FIGURES)]:
        picture = Image.open(path).convert("RGB")
        assert path.stat().st_size < 150_000
        assert picture.width > 900
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert len(picture.resize((60, 40)).getcolors(2400) or []) > 50


def test_the_base_is_intact_on_the_diagonal_of_its_copies() -> None:
    base = toy.Net()
    x, t, cond = toy.normal(50, "test"), torch.linspace(0, 1, 50), toy.nothing(50)
    with torch.no_grad():
        for weight in base.times.embed.parameters():
            weight.mul_(1.1)  # so that the copied second embedder is another one
        net = toy.fork(base)
        assert net(x, t, t, cond).equal(base(x, t, t, cond))
        assert not net(x, t, 0 * t, cond).allclose(base(x, t, 0 * t, cond))
        assert not net(x, -t, -t, cond).allclose(base(x, t, t, cond))


def test_the_distance_of_shifted_points_is_the_shift_on_average() -> None:
    points = toy.dots(500, "test")
    assert toy.distance(points, points.flip(0)) == 0
    moved = points + torch.tensor([3.0, 4.0])
    assert toy.distance(points, moved) == pytest.approx(5 / 2**0.5, rel=1e-4)


def test_points_between_the_dots_are_astray() -> None:
    between = toy.RADIUS * torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert toy.astray(toy.CENTRES) == 0
    assert toy.astray(torch.cat([toy.CENTRES[:2], between])) == 0.5


def test_delta_v_points_from_the_samples_to_the_data() -> None:
    data, own = torch.tensor([0.2, 0.0]), torch.tensor([0.0, 0.1])

    def exact(x_t: Tensor, t: Times, r: Times, cond: Condition, /) -> Tensor:
        goal = torch.where(t[:, None] > 0, data, own)
        return (x_t - goal) / t[:, None].abs()

    along, up = toy.mean_delta_v(exact, own.expand(9, 2)).mean(0).tolist()
    assert 0.2 < along <= 1
    assert -1 <= up < -0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_amplified_by_one_over_delta(dtype: torch.dtype) -> None:
    fine, coarse = toy.rounding(0.01, dtype), toy.rounding(0.04, dtype)
    assert fine == pytest.approx(4 * coarse, rel=0.25)
    assert (fine > 0.1) == (dtype == torch.bfloat16)


def test_too_short_a_training_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        toy.main(["--few-steps", "100"])
    assert stopped.value.code == 2
    assert "--few-steps is 100" in capsys.readouterr().err


def test_the_page_names_code_that_is_there() -> None:
    links = re.findall(r"\[([^\]]+)\]\(([^):]+)\)", PAGE.read_text())
    assert len(links) > 20
    for name, target in links:
        path = PAGE.parent / target
        assert path.is_file(), target
        if name.startswith("`"):
            assert re.search(rf"(def|class) {name.strip('`')}\b", path.read_text()), name


def test_the_page_shows_every_figure() -> None:
    assert sorted(re.findall(r"!\[[^\]]+\]\((.+?)\)", PAGE.read_text())) == sorted(FIGURES)
