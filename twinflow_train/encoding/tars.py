"""WebDataset tars of pictures and captions, found by their headers and read by their offsets."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from twinflow_train.encoding.pictures import SUFFIXES, Size, Unusable, measure
from twinflow_train.encoding.sources import (
    Content,
    Files,
    Reader,
    Source,
    Where,
    as_many,
    opened,
    prompts,
    some,
)
from twinflow_train.errors import UserError

PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
CAPTIONS = ("txt", "json")
"""In this order: tars that have both keep the caption in the one, and much else in the other."""
FIELDS = ("caption", "captions", "text")
"""Keys of a JSON member under which captions are looked for: a string or a list of them."""
PICKLES = ("pth", "pt", "pkl", "pickle", "pyd")
HEADER = 64 * 1024
"""Bytes that hold most pictures' headers."""


@dataclass(kw_only=True)
class WebDataset(Source):
    """Tars whose members `KEY.jpg` (.png, .webp, .bmp) and `KEY.txt` or `KEY.json` belong together.

    A .txt member has one caption a line, a .json member has `caption`, `captions` or `text`.
    Reference images are members `KEY.ref0.jpg`, `KEY.ref1.png`, ...
    """

    def open(self) -> TarReader:
        """Open the tars."""
        return TarReader(self.path, self.references)


@dataclass
class _Member:
    """Where a sample's picture and captions lie in a tar, as (offset, size), and the suffixes."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def first(self, suffixes: tuple[str, ...]) -> Where:
        """Return suffix, offset and size of the first there is; no suffix if there is none."""
        for suffix in suffixes:
            if suffix in self.places:
                return (suffix, *self.places[suffix])
        return ("", 0, 0)

    def references(self) -> Iterator[int]:
        """Yield offset and size of one reference image after the other."""
        number = 0
        while (found := self.first(tuple(f"ref{number}.{one}" for one in PICTURES)))[0]:
            yield from _place(found[1:])
            number += 1


class TarReader(Reader):
    """Finds samples tar by tar, in the order of the members."""

    def __init__(self, path: str, references: int) -> None:
        self._files, self._references = Files(path, (".tar",)), references

    def find(self) -> Iterator[Where]:
        """Yield each sample's (tar, key, captions' suffix, offset, size, picture's likewise).

        Offsets and sizes of its reference images follow, where they are wanted.
        """
        for tar in self._files.names():
            for key, member in _members(self._files.root / tar).items():
                beside = member.references() if self._references else ()
                yield (tar, key, *member.first(CAPTIONS), *member.first(PICTURES), *beside)

    def measure(self, where: Where) -> Size:
        """Read a picture's size from its first bytes, from all where these do not say."""
        self._check(where)
        offset, size = _place(where[6:8])
        try:
            return measure(BytesIO(self._bytes(where, offset, min(size, HEADER))))
        except Unusable:
            return measure(BytesIO(self._bytes(where, offset, size)))

    def read(self, where: Where) -> Content:
        """Read a sample's picture and captions."""
        self._check(where)
        text = self._bytes(where, *_place(where[3:5]))
        captions = prompts(text) if where[2] == "txt" else _said(text)
        picture, *references = (
            self._bytes(where, *_place(where[at : at + 2])) for at in range(6, len(where), 2)
        )
        return Content(captions=captions, picture=picture, references=tuple(references))

    def _check(self, where: Where) -> None:
        if not where[2]:
            raise Unusable(f"the tar holds no {' or '.join(CAPTIONS)} for it")
        if not where[5]:
            raise Unusable(f"the tar holds no {' or '.join(PICTURES)} for it")
        as_many(len(where) // 2 - 4, self._references)

    def _bytes(self, where: Where, offset: int, size: int) -> bytes:
        with opened(self._files.root / str(where[0])) as file:
            file.seek(offset)
            return file.read(size)


def _place(numbers: Where) -> tuple[int, int]:
    offset, size = map(int, numbers)
    return offset, size


def _members(path: Path) -> dict[str, _Member]:
    """Index a tar by the samples' keys; UserError if it is none, or holds a pickle."""
    found: dict[str, _Member] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                if not stem:  # what file managers leave in folders, such as .DS_Store
                    continue
                suffix = suffix.lower()
                if suffix.rpartition(".")[2] in PICKLES:
                    raise UserError(
                        f"source.path: {path}: member {member.name} is a pickle, and nothing here "
                        "unpickles: take such members out of the tar"
                    )
                place = (member.offset_data, member.size)
                found.setdefault(str(name.with_name(stem)), _Member()).places[suffix] = place
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"source.path: {path} is not a whole, uncompressed tar ({error}); copy it again or "
            "unpack it"
        ) from error
    return found


def _said(text: bytes) -> tuple[str, ...]:
    """Read the captions of a JSON member."""
    try:
        said: Any = json.loads(text)
        value: Any = next((said[key] for key in FIELDS if said.get(key)), [])
        return some(
            [value] if isinstance(value, str) else [str(each) for each in value if each is not None]
        )
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Unusable(f"its .json holds no {' or '.join(FIELDS)}") from error
