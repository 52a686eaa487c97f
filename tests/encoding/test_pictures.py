"""Which size a picture gets, and what becomes of its pixels."""

from __future__ import annotations

import io
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.encoding.tools import encoded, picture, pixels
from twinflow_train.encoding.pictures import (
    LARGEST_CUT,
    Size,
    Unusable,
    buckets,
    choose,
    load,
    measure,
    scaled,
)

RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9)


@given(
    side=st.integers(64, 2048),
    multiple=st.sampled_from([8, 16, 32]),
    ratios=st.lists(st.floats(1, 3), min_size=1, max_size=6),
)
def test_sizes_have_the_area_and_the_ratios_to_within_their_multiple(
    side: int, multiple: int, ratios: list[float]
) -> None:
    found = buckets(side, ratios, multiple)
    assert len(set(found)) == len(found) <= 2 * len(ratios)
    assert {Size(size.width, size.height) for size in found} == set(found)
    for size in found:
        assert size.height % multiple == size.width % multiple == 0
    for ratio in ratios:
        exact = (side * math.sqrt(1 / ratio), side * math.sqrt(ratio))
        near = [max(abs(s.height - exact[0]), abs(s.width - exact[1])) for s in found]
        assert min(near) <= multiple / 2 + 1e-9


def test_the_sizes_of_a_megapixel_are_these() -> None:
    assert [str(size) for size in buckets(1024, RATIOS, 16)] == [
        *("1024x1024", "880x1184", "1184x880", "832x1248", "1248x832", "768x1360", "1360x768")
    ]


def test_a_picture_gets_the_size_of_the_nearest_ratio() -> None:
    sizes = buckets(1024, RATIOS, 16)
    for size, expected in (
        ((1024, 1024), "1024x1024"), ((3000, 3100), "1024x1024"), ((1080, 1920), "768x1360"),
        ((1920, 1080), "1360x768"), ((2000, 3000), "832x1248"), ((1500, 2000), "880x1184"),
        ((4000, 8000), "768x1360"),
    ):  # fmt: skip
        assert str(choose(Size(*size), sizes, upscale=1.0)) == expected


def test_a_picture_is_enlarged_only_as_far_as_allowed() -> None:
    sizes = buckets(512, [1.0], 16)
    small = Size(400, 600)
    assert choose(small, sizes, upscale=512 / 400) == Size(512, 512)
    with pytest.raises(Unusable, match=r"400x600 is too small: .* 1\.28 times to 512x512, images"):
        choose(small, sizes, upscale=1.27)


def test_a_picture_of_which_most_would_be_lost_is_left_out() -> None:
    sizes = buckets(512, [1.0], 16)
    assert choose(Size(1000, 1999), sizes, upscale=1.0) == Size(512, 512)
    with pytest.raises(Unusable, match=r"1000x2100 is too long: 52% of it would be cut away"):
        choose(Size(1000, 2100), sizes, upscale=1.0)
    assert LARGEST_CUT == 0.5


def test_a_picture_of_its_size_keeps_its_pixels() -> None:
    image = picture(1, 48, 80)
    assert torch.equal(load(encoded(image), Size(48, 80))[1], pixels(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_every_format_is_measured_and_read(kind: str, tmp_path: Path) -> None:
    image = picture(2, 90, 64)
    data = encoded(image, kind)
    (tmp_path / "picture").write_bytes(data)
    assert measure(tmp_path / "picture") == measure(io.BytesIO(data)) == Size(90, 64)
    original, found = load(data, Size(80, 48))
    assert (original, found.shape, found.dtype) == (Size(90, 64), (3, 80, 48), torch.uint8)
    expected = pixels(ImageOps.fit(image, (48, 80), Image.Resampling.LANCZOS))
    assert float((found.float() - expected.float()).abs().mean()) < 6  # JPEG is lossy


def test_the_middle_is_kept_and_nothing_is_squeezed() -> None:
    """A disc in the middle of a wide picture stays a disc in the middle."""
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (50, 0, 150, 100))
    _, found = load(encoded(image), Size(64, 64))
    assert float(found.float().mean()) == pytest.approx(255, abs=1)
    _, found = load(encoded(image), Size(32, 64))
    assert float(found[:, :, :14].float().mean()) < 3
    assert float(found[:, :, 18:46].float().mean()) > 252


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_s_orientation_is_obeyed(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(3, 48, 96)
    data = encoded(image, "JPEG", exif=exif, quality=95)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    size = Size(turned.height, turned.width)
    assert measure(io.BytesIO(data)) == size
    original, found = load(data, size)
    assert original == size
    assert torch.equal(found, pixels(turned))


def test_what_is_transparent_becomes_white() -> None:
    image = picture(4).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    for kind in ("PNG", "WEBP"):
        _, found = load(encoded(image, kind), Size(64, 64))
        assert int(found.min()) == 255


def test_other_modes_are_shown_in_colour() -> None:
    grey = picture(5).convert("L")
    for image in (grey, picture(5).convert("P"), picture(5).convert("1")):
        _, found = load(encoded(image), Size(64, 64))
        assert torch.equal(found, pixels(image))
    deep = Image.fromarray(torch.arange(4096).view(64, 64).mul(16).to(torch.uint16).numpy())
    assert deep.mode == "I;16"
    _, found = load(encoded(deep), Size(64, 64))
    expected = torch.arange(4096).view(64, 64).mul(16) >> 8
    assert torch.equal(found[0].int(), expected.int())


def test_bytes_become_numbers_between_minus_one_and_one() -> None:
    found = scaled(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2))
    assert found.flatten().tolist() == [-1, 1] * 3


@given(st.binary(max_size=60), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), st.integers(0, 900))
def test_a_damaged_picture_is_left_out_and_stops_nothing(
    noise: bytes, kind: str, place: int
) -> None:
    data = encoded(picture(6, 32, 32), kind)
    for damaged in (noise, data[:place], data[:place] + noise + data[place + len(noise) :]):
        with suppress(Unusable):
            size = measure(io.BytesIO(damaged))
            _, found = load(damaged, Size(32, 32))
            assert size.height > 0
            assert found.shape == (3, 32, 32)


def test_readers_that_start_programs_are_never_asked() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(Unusable, match="UnidentifiedImageError"):
        measure(io.BytesIO(data))
