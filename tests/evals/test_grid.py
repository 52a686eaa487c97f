from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont

from twinflow_train.evals import grid
from twinflow_train.evals.grid import Column, draw, save


def column(rows: int, channels: int = 1, side: int = 28, heading: str = "ema\n1 NFE") -> Column:
    return Column(heading=heading, images=torch.zeros(rows, channels, side, side))


def test_small_images_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    image = torch.full((1, 1, 2, 2), -1.0)
    image[0, 0, 0, 1] = 1.0
    picture = draw([Column(heading="h", images=image)], prompts=["p"])
    save(picture, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as read:
        assert read.format == "PNG"
        tile = read.crop((read.width - 78, read.height - 78, read.width - 6, read.height - 6))
        assert [tile.getpixel(at) for at in ((0, 0), (71, 0), (35, 35), (36, 0))] == [
            (0, 0, 0), (255, 255, 255), (0, 0, 0), (255, 255, 255),
        ]  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_three_channels_keep_their_colour_and_large_images_their_size() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 100, 120)
    picture = draw([Column(heading="h", images=red)], prompts=["p"])
    assert picture.getpixel((picture.width - 10, picture.height - 10)) == (255, 0, 0)
    assert picture.width < 120 * 2


def test_values_that_are_no_colours_are_drawn_all_the_same() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 9.0]).view(1, 1, 2, 2)
    draw([Column(heading="h", images=odd)], prompts=["p"])


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "x",
        "w" * 100_000,
        "a b " * 50_000,
        "two\nlines\ttab\0nul",
        "\u5b57 \U0001f600 \u202e",
        "iiiiii",
    ],
)
def test_any_prompt_fits_its_column(prompt: str) -> None:
    font = ImageFont.load_default(grid.FONT_PIXELS)
    text = grid._fitted(prompt, font, lines=3)
    assert text.count("\n") < 3
    assert grid._width(text, font) <= grid.CAPTION_PIXELS
    assert len(draw([column(1)], prompts=[prompt]).getbands()) == 3


def test_long_prompts_are_wrapped_then_cut() -> None:
    font = ImageFont.load_default(grid.FONT_PIXELS)
    assert grid._fitted("a handwritten seven", font, lines=3) == "a handwritten seven"
    cut = grid._fitted("a photograph of a very old lighthouse at dusk " * 4, font, lines=2)
    assert cut.count("\n") == 1
    assert cut.endswith("...")


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 prompts, but columns have \[2, 3\]"):
        draw([column(2), column(3)], prompts=["a", "b"])
