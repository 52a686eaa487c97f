"""Small pictures and captions as each kind of source has them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

SIZES = ((64, 64), (80, 48), (48, 80), (70, 64))
"""Heights and widths of pictures that fill the sizes of `side=64`, cut a little or not at all."""


def picture(number: int, height: int = 64, width: int = 64) -> Image.Image:
    """Draw a smooth picture, another one for each number."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    channels = (x * 255 // width, y * 255 // height, (x + y + 37 * number) % 256)
    return Image.fromarray(torch.stack(channels, -1).to(torch.uint8).numpy())


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> Tensor:
    """Return a picture as bytes (3, height, width)."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)


def write_folder(root: Path, numbers: Iterable[int]) -> Path:
    """Write pictures in two folders, with one or two captions each."""
    for number in numbers:
        inner = root / ("odd" if number % 2 else "even")
        inner.mkdir(parents=True, exist_ok=True)
        image = picture(number, *SIZES[number % len(SIZES)])
        image.save(inner / f"{number:03d}.png")
        second = f"\n\n  the image of {number}  \n" if number % 3 == 0 else "\n"
        (inner / f"{number:03d}.txt").write_text(f"picture {number}{second}")
    return root


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: Mapping[str, list[Any]], *, rows_a_group: int = 3) -> Path:
    """Write a Parquet file, several row groups long."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=rows_a_group)
    return path
