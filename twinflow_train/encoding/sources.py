"""What every source of pictures and captions provides, in an order that never changes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from twinflow_train.encoding.pictures import Size, Unusable
from twinflow_train.errors import UserError, check

Where = tuple[str | int, ...]
"""How a source finds a thing again: plain values, first the file, then what names it in there."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture with its captions, or one caption. number: counted in the source's order."""

    number: int
    where: Where

    @property
    def name(self) -> str:
        """Name it for people."""
        name = ":".join(map(str, self.where[:2]))
        return name.encode(errors="backslashreplace").decode()  # systems allow any bytes


@dataclass(frozen=True, kw_only=True)
class Content:
    """What an item holds: its captions, and the bytes of its picture's file if it has one.

    references: the bytes of its reference images' files, for editing.
    """

    captions: tuple[str, ...]
    picture: bytes | None = None
    references: tuple[bytes, ...] = ()


class Reader(ABC):
    """An opened source. Safe to ask from several threads."""

    @abstractmethod
    def find(self) -> Iterator[Where]:
        """Yield where everything is, without reading pictures; UserError if there is nothing."""

    def measure(self, where: Where) -> Size:
        """Read a picture's size from its header; Unusable if it or its captions are missing."""
        raise AssertionError(f"{where} is a caption without a picture: nobody measures it")

    @abstractmethod
    def read(self, where: Where) -> Content:
        """Read an item; Unusable if there is nothing to use."""


@dataclass(kw_only=True)
class Source(ABC):
    """Where pictures and captions come from: the `source` group.

    path: a file or a folder. references: reference images of each item, for editing: the pictures
    that its caption says how to turn into its own. Items with fewer or more are left out.
    """

    pictures: ClassVar[bool] = True

    path: str = "???"
    references: int = 0

    def __post_init__(self) -> None:
        check("source", self, [("references", self.references >= 0, "0 or more")])

    @abstractmethod
    def open(self) -> Reader:
        """Open it; UserError if it cannot be read."""


class Files:
    """The files with these suffixes under a folder, or one file; UserError if it does not exist.

    root: what the files' names are relative to.
    """

    def __init__(self, path: str, suffixes: Sequence[str]) -> None:
        self._path, self._suffixes = Path(path), tuple(suffixes)
        if not os.path.exists(path):
            raise UserError(f"source.path: {path} does not exist")
        self.root = self._path if self._path.is_dir() else self._path.parent

    def names(self) -> list[str]:
        """List the files in the order of their names; UserError if there are none."""
        if self.root != self._path:
            return [self._path.name]
        found = [
            os.path.relpath(os.path.join(folder, name), self.root)
            for folder, _, names in os.walk(self.root, onerror=_refuse)
            for name in names
            if name.lower().endswith(self._suffixes)
        ]
        if not found:
            raise UserError(
                f"source.path: {self._path} holds no {' or '.join(self._suffixes)} file"
            )
        return sorted(found)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file that holds many items; UserError, here or while it is read, if it cannot be."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _refuse(error: OSError) -> None:
    raise _unreadable(error.filename, error) from error


def _unreadable(path: Path | str, error: OSError) -> UserError:
    return UserError(f"source.path: {path} cannot be read ({error.strerror}); mend or remove it")


def as_many(found: int, wanted: int) -> None:
    """Refuse an item with another number of reference images: Unusable."""
    if found != wanted:
        raise Unusable(f"it has {found} reference images, source.references is {wanted}")


def prompts(text: bytes) -> tuple[str, ...]:
    """Read one caption a line, without blank ones; Unusable if there is none."""
    try:
        lines = text.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise Unusable("its captions are not UTF-8") from error
    return some(lines)


def some(captions: Sequence[str]) -> tuple[str, ...]:
    """Strip captions and drop empty ones; Unusable if none is left."""
    found = tuple(caption.strip() for caption in captions if caption.strip())
    if not found:
        raise Unusable("it has no caption")
    return found
