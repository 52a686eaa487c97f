"""A folder of pictures, each beside a text file of the same name with one caption a line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twinflow_train.encoding.pictures import SUFFIXES, Size, Unusable, measure
from twinflow_train.encoding.sources import Content, Files, Reader, Source, Where, as_many, prompts

REFERENCE = re.compile(r"\.ref\d+\.\w+$", re.ASCII)
"""What the names of reference images end with."""


@dataclass(kw_only=True)
class Folder(Source):
    """Pictures and captions in files: `cats/1.jpg` beside `cats/1.txt`, in any subfolder.

    Reference images stand there as `cats/1.ref0.jpg`, `cats/1.ref1.png`, ...
    """

    def open(self) -> FolderReader:
        """Open the folder."""
        return FolderReader(self.path, self.references)


class FolderReader(Reader):
    """Finds pictures in the order of their paths."""

    def __init__(self, path: str, references: int = 0) -> None:
        self._files, self._references = Files(path, SUFFIXES), references

    def find(self) -> Iterator[Where]:
        """Yield each picture's path inside the folder; not those of reference images."""
        for name in self._files.names():
            if not (self._references and REFERENCE.search(name)):
                yield (name,)

    def measure(self, where: Where) -> Size:
        """Read a picture's size; Unusable if its captions are missing."""
        path = self._files.root / str(where[0])
        if not os.path.isfile(_captions(path)):  # Path.is_file raises where it may not look
            raise _uncaptioned(path)
        self._beside(path)
        return measure(path)

    def read(self, where: Where) -> Content:
        """Read a picture's file and its captions."""
        path = self._files.root / str(where[0])
        try:
            text = _captions(path).read_bytes()
        except FileNotFoundError as error:
            raise _uncaptioned(path) from error
        except OSError as error:
            raise Unusable(f"its captions cannot be read ({error.strerror})") from error
        try:
            return Content(
                captions=prompts(text),
                picture=path.read_bytes(),
                references=tuple(reference.read_bytes() for reference in self._beside(path)),
            )
        except OSError as error:
            raise Unusable(f"it cannot be read ({error.strerror})") from error

    def _beside(self, path: Path) -> list[Path]:
        """Find a picture's reference images; Unusable if they are not as many as they should be."""
        found: list[Path] = []
        while self._references and (reference := _reference(path, len(found))):
            found.append(reference)
        as_many(len(found), self._references)
        return found


def _reference(path: Path, number: int) -> Path | None:
    """Find the file of one reference image, if there is one."""
    suffixes = dict.fromkeys([path.suffix, *SUFFIXES])
    names = (path.with_name(f"{path.stem}.ref{number}{suffix}") for suffix in suffixes)
    return next((name for name in names if os.path.isfile(name)), None)


def _captions(path: Path) -> Path:
    """Name the file of a picture's captions: cameras and old systems write it in capitals."""
    usual, capitals = path.with_suffix(".txt"), path.with_suffix(".TXT")
    return capitals if os.path.isfile(capitals) and not os.path.isfile(usual) else usual


def _uncaptioned(path: Path) -> Unusable:
    return Unusable(f"there is no {_captions(path).name} beside it")
