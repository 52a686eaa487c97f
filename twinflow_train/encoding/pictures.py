"""Pictures: how large one is, which size it gets, and its pixels at that size."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""What is opened at all: some of Pillow's other readers start programs."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientations ask for."""
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, EOFError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise on a damaged picture, each in its own place."""
LARGEST_CUT = 0.5
"""Share of a picture that may be cut away: with more, its caption would speak of what is gone."""


class Unusable(Exception):
    """Something is left out; the message says why."""


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def buckets(side: int, ratios: Sequence[float], multiple: int) -> tuple[Size, ...]:
    """Return sizes of about side x side pixels, landscape and portrait of each aspect ratio.

    Heights and widths are multiples of `multiple`; the sizes are all different.
    """
    found = []
    for ratio in ratios:
        long, short = (_rounded(side * math.sqrt(r), multiple) for r in (ratio, 1 / ratio))
        found += [Size(short, long), Size(long, short)]
    return tuple(dict.fromkeys(found))


def _rounded(pixels: float, multiple: int) -> int:
    return max(round(pixels / multiple), 1) * multiple


def choose(size: Size, sizes: Sequence[Size], *, upscale: float) -> Size:
    """Choose the size whose aspect ratio is nearest to a picture's.

    Raises:
        Unusable: the picture would have to be enlarged by more than `upscale`, or half of it would
            be cut away.
    """
    ratio = math.log(size.width / size.height)
    best = min(sizes, key=lambda s: abs(math.log(s.width / s.height) - ratio))
    scale = max(best.height / size.height, best.width / size.width)
    if scale > upscale:
        raise Unusable(
            f"{size} is too small: it would be enlarged {scale:.2f} times to {best}, "
            f"images.upscale allows {upscale:g}"
        )
    cut = 1 - (best.height / scale / size.height) * (best.width / scale / size.width)
    if cut > LARGEST_CUT:
        raise Unusable(f"{size} is too long: {cut:.0%} of it would be cut away for {best}")
    return best


def measure(picture: BinaryIO | Path) -> Size:
    """Read a picture's size as it is to be shown, from its header; Unusable if it is none."""
    try:
        with Image.open(picture, formats=FORMATS) as opened:
            height, width = opened.height, opened.width
            lying = _orientation(opened) >= 5
    except DAMAGED as error:
        raise _damaged(error) from error
    return Size(width, height) if lying else Size(height, width)


def load(picture: bytes, size: Size) -> tuple[Size, UInt8[Tensor, "3 h w"]]:
    """Decode a picture, resize it to cover `size` and cut the rest away evenly.

    Returns its own size and its pixels. What is transparent becomes white; a damaged picture is
    Unusable.
    """
    try:
        with Image.open(BytesIO(picture), formats=FORMATS) as opened:
            turn = TURNS.get(_orientation(opened))
            shown = _rgb(opened)
        if turn is not None:
            shown = shown.transpose(turn)
        fitted = ImageOps.fit(shown, (size.width, size.height), Image.Resampling.LANCZOS)
    except DAMAGED as error:
        raise _damaged(error) from error
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
    return Size(shown.height, shown.width), pixels


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation. PNG's may come after the pixels, and is ignored."""
    return 1 if picture.format == "PNG" else picture.getexif().get(ORIENTATION, 1)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture.convert("RGB")


def _damaged(error: Exception) -> Unusable:
    return Unusable(f"not a picture that can be read ({type(error).__name__})")


def scaled(pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Turn bytes into float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1
