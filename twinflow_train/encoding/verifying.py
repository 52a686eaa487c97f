"""Looking at a finished set: latents decoded and compared with the pictures they came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.images import Images
from twinflow_train.encoding.making import key_of
from twinflow_train.encoding.pictures import Size, Unusable, scaled
from twinflow_train.encoding.plan import Plan
from twinflow_train.encoding.sources import Reader
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.models.codec import Codec

A_SIZE = 8
"""Samples of each size that are looked at."""
TILE, LINE, GAP = 192, 18, 4
PIXEL_RANGE = 2.0
SMALLEST_ERROR = 1e-10


@dataclass(kw_only=True)
class Verified:
    """What was found. psnr: of each sample looked at, in decibels, by size; picture: its file."""

    psnr: Mapping[Size, Sequence[float]]
    picture: Path


@dataclass(kw_only=True)
class _Row:
    """One size's pictures in [-1, 1], and what was made of them."""

    size: Size
    decoded: list[Float[Tensor, "3 h w"]] = field(default_factory=list)
    originals: list[Float[Tensor, "3 h w"]] = field(default_factory=list)

    def psnr(self) -> list[float]:
        """Compare; nothing where images were generated."""
        pairs = zip(self.originals, self.decoded, strict=False)
        return [psnr(original, decoded) for original, decoded in pairs]


def verify(
    shards: ShardSet,
    plan: Plan,
    *,
    reader: Reader,
    codec: Codec,
    images: Images,
    path: Path,
) -> Verified:
    """Decode some latents of each size, compare them, and draw originals above reconstructions.

    Raises:
        UserError: an original is not there any more, or damaged.
    """
    rows: dict[Size, _Row] = {}
    for number, sample in _chosen(shards):
        assert sample.latent is not None, "only a set with latents is verified"
        decoded = codec.decode(sample.latent.float()[None])[0].cpu()
        task = plan.task(number)
        item = next(item for item in task.items if key_of(item.number) == sample.key)
        row = rows.setdefault(task.size, _Row(size=task.size))
        row.decoded.append(decoded)
        try:
            pixels = images.ready(item, reader.read(item.where), task.size).pixels
        except Unusable as reason:
            raise UserError(
                f"verify: {item.name} is not what it was when it was prepared ({reason}); bring it "
                "back, or leave verify=true out: the set is whole"
            ) from reason
        if pixels is not None:
            row.originals.append(scaled(pixels))
    with whole_file(path) as unfinished:
        _sheet(list(rows.values())).save(unfinished, format="PNG", optimize=True)
    return Verified(psnr={size: row.psnr() for size, row in rows.items()}, picture=path)


def psnr(original: Float[Tensor, "3 h w"], decoded: Float[Tensor, "3 h w"]) -> float:
    """Return the peak signal-to-noise ratio of pictures in [-1, 1], in decibels, 106 at most."""
    error = float((original - decoded).square().mean())
    return 10 * math.log10(PIXEL_RANGE**2 / max(error, SMALLEST_ERROR))


def _chosen(shards: ShardSet) -> Iterator[tuple[int, Sample]]:
    """Yield (number of the task, sample), evenly spread over each size."""
    starts = list(accumulate(shards.counts, initial=0))
    for numbers in shards.manifest.buckets.values():
        places = [(n, index) for n in numbers for index in range(starts[n], starts[n + 1])]
        many = min(A_SIZE, len(places))
        for i in range(many):
            number, index = places[i * len(places) // many]
            stem = PurePosixPath(shards.manifest.shards[number].file).stem
            yield int(stem), shards.read(index)


def _sheet(rows: Sequence[_Row]) -> Image.Image:
    """Draw each size's originals, where there are any, above what was decoded."""
    strips: list[Image.Image] = []
    for row in rows:
        found = row.psnr()
        said = f", {sum(found) / len(found):.1f} dB, at least {min(found):.1f}" if found else ""
        above = "originals above decoded latents" if found else "decoded latents"
        strips.append(_label(f"{row.size}: {above}{said}"))
        strips += [_strip(each) for each in (row.originals, row.decoded) if each]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height + GAP for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    return sheet


def _label(text: str) -> Image.Image:
    strip = Image.new("RGB", (8 * len(text), LINE), "white")
    ImageDraw.Draw(strip).text((GAP, 2), text, "black")
    return strip


def _strip(pictures: Sequence[Float[Tensor, "3 h w"]]) -> Image.Image:
    """Draw pictures of one size side by side, none larger than a tile."""
    height, width = pictures[0].shape[-2:]
    scale = min(TILE / max(height, width), 1.0)
    tile = (max(round(width * scale), 1), max(round(height * scale), 1))
    strip = Image.new("RGB", ((tile[0] + GAP) * len(pictures), tile[1]), "white")
    for i, picture in enumerate(pictures):
        levels = ((picture.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        shown = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
        strip.paste(shown.resize(tile, Image.Resampling.LANCZOS), (i * (tile[0] + GAP), 0))
    return strip
