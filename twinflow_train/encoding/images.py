"""Where latents come from: a source's pictures, nowhere, or the base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.encoding.pictures import Size, Unusable, buckets, choose, load, scaled
from twinflow_train.encoding.sources import Content, Item, Reader
from twinflow_train.errors import UserError, check
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Codec


@dataclass(kw_only=True)
class Ready:
    """An item that was read. size: the shard's, pixels: cut to it; original: the picture's own.

    references: the pixels of its reference images, cut to the same size.
    """

    item: Item
    size: Size
    captions: tuple[str, ...]
    original: Size | None = None
    pixels: UInt8[Tensor, "3 h w"] | None = None
    references: tuple[UInt8[Tensor, "3 h w"], ...] = ()


Latents = Callable[[Sequence[Ready], Sequence[Embedding]], Sequence[Float[Tensor, "c h w"] | None]]
"""Makes the latents of items of one size; also gets the embedding of each one's first caption."""


@dataclass(kw_only=True)
class Images(ABC):
    """Where latents come from: the `images` group of the configuration."""

    pictures: ClassVar[bool] = False
    """Whether the source has to have pictures."""
    latents: ClassVar[bool] = True
    """Whether samples get latents."""
    generates: ClassVar[bool] = False
    """Whether the base model makes them."""

    def weights(self) -> str:
        """Identify the weights that make the images, wherever they lie; empty if none do."""
        return ""

    @abstractmethod
    def of_one_size(self) -> Images:
        """Return the same of one size alone, for a held-out set."""

    @abstractmethod
    def sizes_for(self, multiple: int) -> tuple[Size, ...]:
        """List the sizes that shards may have; UserError if `multiple` pixels do not divide one."""

    @abstractmethod
    def place(self, item: Item, reader: Reader, sizes: Sequence[Size]) -> Size:
        """Choose an item's size; Unusable says why it gets none."""

    def ready(self, item: Item, content: Content, size: Size) -> Ready:
        """Make an item ready for encoding, in a thread; Unusable if it cannot be used."""
        return Ready(item=item, size=size, captions=content.captions)

    @abstractmethod
    def open(self, codec: Codec, model: Model, device: torch.device) -> Latents:
        """Load what makes the latents."""


@dataclass(kw_only=True)
class Stored(Images):
    """The source's own pictures, encoded: each is cut to the size of the nearest aspect ratio.

    Reference images are cut to the same size as the picture that they belong to.

    side: sizes have about side x side pixels. ratios: long to short side, from 1 on; each size also
    lies on its side. upscale: pictures that would have to be enlarged more are left out.
    """

    pictures: ClassVar[bool] = True

    side: int = 1024
    ratios: list[float] = field(default_factory=lambda: [1.0, 4 / 3, 3 / 2, 16 / 9])
    upscale: float = 1.25

    def __post_init__(self) -> None:
        ratios = bool(self.ratios) and all(1 <= ratio < float("inf") for ratio in self.ratios)
        rules = (
            ("side", self.side >= 1, "at least 1"),
            ("ratios", ratios, "a list of numbers from 1 on"),
            ("upscale", 0 < self.upscale < float("inf"), "positive"),
        )
        check("images", self, rules)

    def of_one_size(self) -> Stored:
        """Return the same, all cut to squares."""
        return replace(self, ratios=[1.0])

    def sizes_for(self, multiple: int) -> tuple[Size, ...]:
        """List the sizes of the aspect ratios."""
        return buckets(self.side, self.ratios, multiple)

    def place(self, item: Item, reader: Reader, sizes: Sequence[Size]) -> Size:
        """Choose the nearest size from the picture's header."""
        return choose(reader.measure(item.where), sizes, upscale=self.upscale)

    def ready(self, item: Item, content: Content, size: Size) -> Ready:
        """Decode and cut the picture."""
        assert content.picture is not None, "sources with pictures read pictures"
        original, pixels = load(content.picture, size)
        return Ready(
            item=item,
            size=size,
            captions=content.captions,
            original=original,
            pixels=pixels,
            references=tuple(self._cut(each, size) for each in content.references),
        )

    def _cut(self, reference: bytes, size: Size) -> UInt8[Tensor, "3 h w"]:
        """Decode and cut a reference image like the picture; Unusable if too little is left."""
        try:
            own, pixels = load(reference, size)
            choose(own, [size], upscale=self.upscale)
        except Unusable as reason:
            raise Unusable(f"a reference image: {reason}") from reason
        return pixels

    def open(self, codec: Codec, model: Model, device: torch.device) -> Latents:
        """Encode with the codec."""

        def latents(batch: Sequence[Ready], texts: Sequence[Embedding]) -> Sequence[Tensor]:
            pixels = [each.pixels for each in batch if each.pixels is not None]
            return list(codec.encode(scaled(torch.stack(pixels).to(device))))

        return latents


@dataclass(kw_only=True)
class Chosen(Images):
    """Images of sizes that are chosen beforehand.

    sizes: heights and widths in pixels; items get them in turn.
    """

    sizes: list[list[int]] = field(default_factory=lambda: [[1024, 1024]])

    def __post_init__(self) -> None:
        good = bool(self.sizes) and all(len(s) == 2 and min(s) >= 1 for s in self.sizes)
        check("images", self, [("sizes", good, "a list of [height, width] in pixels")])

    def of_one_size(self) -> Chosen:
        """Return the same of the first size."""
        return replace(self, sizes=self.sizes[:1])

    def sizes_for(self, multiple: int) -> tuple[Size, ...]:
        """List the sizes; UserError if `multiple` does not divide one."""
        for height, width in self.sizes:
            if height % multiple or width % multiple:
                raise UserError(
                    f"images.sizes: {height}x{width} is not a multiple of {multiple} pixels; the "
                    f"nearest is {_near(height, multiple)}x{_near(width, multiple)}"
                )
        return tuple(Size(*size) for size in self.sizes)

    def place(self, item: Item, reader: Reader, sizes: Sequence[Size]) -> Size:
        """Take the sizes in turn."""
        return sizes[item.number % len(sizes)]


def _near(pixels: int, multiple: int) -> int:
    return max(round(pixels / multiple), 1) * multiple


@dataclass(kw_only=True)
class NoImages(Chosen):
    """None: for image-free training, which generates its own in these sizes."""

    latents: ClassVar[bool] = False

    def open(self, codec: Codec, model: Model, device: torch.device) -> Latents:
        """Make none."""
        return lambda batch, texts: [None] * len(batch)
