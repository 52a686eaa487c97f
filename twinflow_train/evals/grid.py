"""A labelled picture of images: rows are prompts, columns are models and numbers of evaluations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from twinflow_train.files import whole_file

PAPER, INK = "white", "black"
FONT_PIXELS, GAP, CAPTION_PIXELS, LONGEST = 15, 6, 170, 500
SMALLEST = 72
"""Images with a shorter side than this are enlarged by a whole factor, without smoothing."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: a heading, with line breaks, and an image in [-1, 1] for each prompt."""

    heading: str
    images: Float[Tensor, "rows channels height width"]


def draw(columns: Sequence[Column], *, prompts: Sequence[str]) -> Image.Image:
    """Draw columns beside the prompts; images have 1 or 3 channels and all the same size.

    Long prompts are wrapped and cut. Values outside [-1, 1] are clamped, what is not finite is 0.
    Raises ValueError if columns and prompts differ in their number of rows.
    """
    if not columns or any(len(column.images) != len(prompts) for column in columns):
        counts = [len(column.images) for column in columns]
        raise ValueError(f"{len(prompts)} prompts, but columns have {counts} images")
    font = ImageFont.load_default(FONT_PIXELS)
    line = FONT_PIXELS + 4
    height, width = columns[0].images.shape[-2:]
    factor = max(1, -(-SMALLEST // min(height, width)))
    tile = (width * factor, height * factor)
    texts = [_fitted(prompt, font, lines=max(tile[1] // line, 1)) for prompt in prompts]
    margin = max([_width(text, font) for text in texts], default=0) + 2 * GAP
    across = max(tile[0], *(_width(column.heading, font) for column in columns)) + GAP
    down = max(tile[1], line) + GAP
    top = line * max(column.heading.count("\n") + 1 for column in columns) + GAP
    canvas = Image.new("RGB", (margin + across * len(columns), top + down * len(prompts)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for row, text in enumerate(texts):
        pen.multiline_text((GAP, top + row * down), text, INK, font=font)
    for place, column in enumerate(columns):
        left = margin + place * across
        pen.multiline_text((left, GAP // 2), column.heading, INK, font=font)
        for row, image in enumerate(column.images):
            enlarged = picture(image).resize(tile, Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, top + row * down))
    return canvas


def picture(image: Float[Tensor, "channels height width"]) -> Image.Image:
    """Turn an image in [-1, 1], of 1 or 3 channels, into 8-bit RGB."""
    levels = (image.float().nan_to_num(0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1) + 1) * 127.5
    pixels = levels.round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu()
    return Image.fromarray(pixels.numpy())


def save(drawn: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with whole_file(path) as unfinished:
        drawn.save(unfinished, format="PNG", optimize=True)


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Return the width of the widest line in pixels."""
    return max(int(font.getlength(line)) + 1 for line in text.split("\n"))


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, lines: int) -> str:
    """Wrap a prompt to the caption column, on at most `lines` lines, ending in ... if cut."""
    plain = "".join(char if char.isprintable() else " " for char in text[:LONGEST])
    letters = max(len(plain), 8)
    while letters > 3:
        cut = textwrap.wrap(plain, letters, max_lines=lines, placeholder="...") or [""]
        widest = max(_width(part, font) for part in cut)
        if widest <= CAPTION_PIXELS:
            return "\n".join(cut)
        letters = min(letters - 1, max(letters * CAPTION_PIXELS // widest, 4))
    return ""
