"""One safetensors file of flat ranges: its header written and read here, its tensors by ranges.

A file is the length of the header (8 bytes, little-endian), the header (JSON: for each tensor its
type, shape and place) and the numbers. Read so, a part of a tensor costs a part of the file, on a
disk and behind a URL alike, and nothing is ever executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinflow_train.place import CHUNK, Place, Reader

LONGEST_HEADER = 100_000_000
"""Bytes; what the library refuses too."""

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class DamageError(Exception):
    """What is read is not what was written; the message says where and why."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A flat range of a whole tensor as it lies in a file.

    shape: of the whole tensor. offset: where the range begins in it. length: of the range, in
    numbers. begin: its first byte after the header.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    length: int
    begin: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.begin + self.length * self.dtype.itemsize


def header(pieces: Mapping[str, Piece]) -> bytes:
    """Return what a file of these pieces begins with, padded so that numbers are aligned."""
    entries = {
        key: {
            "dtype": NAMES[piece.dtype],
            "shape": [piece.length],
            "data_offsets": [piece.begin, piece.end],
        }
        for key, piece in pieces.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its type, how many numbers, and its first byte in the file."""

    dtype: torch.dtype
    length: int
    begin: int


@dataclass(frozen=True)
class RangeFile:
    """An open safetensors file."""

    place: Place
    reader: Reader
    tensors: Mapping[str, Stored]

    @staticmethod
    @contextmanager
    def open(place: Place) -> Iterator[RangeFile]:
        """Open a file and read its header; DamageError if that is none."""
        with place.reader() as reader:
            yield RangeFile(place, reader, _tensors(place, reader))

    def parts(self, key: str, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the numbers from `start` to `stop` of a tensor in order, a few million at once."""
        stored = self.tensors[key]
        wide = stored.dtype.itemsize
        for low in range(start, stop, CHUNK // wide):
            high = min(stop, low + CHUNK // wide)
            begin, end = stored.begin + low * wide, stored.begin + high * wide
            data = self.reader.read(begin, end)
            if len(data) != end - begin:
                raise DamageError(f"{self.place} ends in the middle of {key}")
            yield torch.frombuffer(data, dtype=stored.dtype)


def _tensors(place: Place, reader: Reader) -> dict[str, Stored]:
    """Read the header of a file."""
    size = reader.size()
    length = int.from_bytes(reader.read(0, 8), "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise DamageError(f"{place} is no safetensors file: its header has {length} bytes")
    try:
        entries = json.loads(bytes(reader.read(8, 8 + length)))
        return {
            key: _stored(entry, first=8 + length, size=size)
            for key, entry in entries.items()
            if key != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamageError(f"{place} is no safetensors file ({error!r})") from error


def _stored(entry: Mapping[str, Any], *, first: int, size: int) -> Stored:
    """Check one entry of a header against the file."""
    dtype, (begin, end) = TYPES[entry["dtype"]], entry["data_offsets"]
    length = math.prod(entry["shape"])
    if not all(isinstance(number, int) for number in (length, begin, end)):
        raise TypeError("a place that is no number")
    if not 0 <= begin <= end <= size - first or end - begin != length * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} of {size}")
    return Stored(dtype=dtype, length=length, begin=first + begin)
