"""A folder of pictures, each beside a text file of the same name with one caption a line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twinflow_train.encoding.pictures import SUFFIXES, Size, Unusable, measure
from twinflow_train.encoding.sources import Content, Files, Reader, Source, Where, prompts


@dataclass(kw_only=True)
class Folder(Source):
    """Pictures and captions in files: `cats/1.jpg` beside `cats/1.txt`, in any subfolder."""

    def open(self) -> FolderReader:
        """Open the folder."""
        return FolderReader(self.path)


class FolderReader(Reader):
    """Finds pictures in the order of their paths."""

    def __init__(self, path: str) -> None:
        self._files = Files(path, SUFFIXES)

    def find(self) -> Iterator[Where]:
        """Yield each picture's path inside the folder."""
        yield from ((name,) for name in self._files.names())

    def measure(self, where: Where) -> Size:
        """Read a picture's size; Unusable if its captions are missing."""
        path = self._files.root / str(where[0])
        if not os.path.isfile(_captions(path)):  # Path.is_file raises where it may not look
            raise _uncaptioned(path)
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
            return Content(captions=prompts(text), picture=path.read_bytes())
        except OSError as error:
            raise Unusable(f"it cannot be read ({error.strerror})") from error


def _captions(path: Path) -> Path:
    return path.with_suffix(".txt")


def _uncaptioned(path: Path) -> Unusable:
    return Unusable(f"there is no {_captions(path).name} beside it")
