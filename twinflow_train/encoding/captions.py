"""Captions without pictures: text files with one a line, or a column of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from twinflow_train.encoding.parquet import SUFFIX, Rows
from twinflow_train.encoding.parquet import captions as captions_of_row
from twinflow_train.encoding.sources import Content, Files, Reader, Source, Where, opened, prompts


@dataclass(kw_only=True)
class Captions(Source):
    """Prompts alone: text files with one a line, Parquet files, or a folder of both.

    text: the column of Parquet files.
    """

    pictures: ClassVar[bool] = False

    text: str = "text"

    def open(self) -> CaptionReader:
        """Open the place where they are."""
        return CaptionReader(Files(self.path, (".txt", SUFFIX)), self.text)


class CaptionReader(Reader):
    """Reads lines that are not blank, and rows."""

    def __init__(self, files: Files, column: str) -> None:
        self._files, self._column = files, column

    def find(self) -> Iterator[Where]:
        """Yield each line's (file, number from 1 on, offset, size); of a row, what `Rows` says."""
        for name in self._files.names():
            yield from self._rows.find(name) if name.endswith(SUFFIX) else self._lines(name)

    def read(self, where: Where) -> Content:
        """Read a line, or a row's captions."""
        name, _, offset, size = where
        if str(name).endswith(SUFFIX):
            return Content(captions=captions_of_row(self._rows.row(where)))
        with opened(self._files.root / str(name)) as file:
            file.seek(int(offset))
            return Content(captions=prompts(file.read(int(size))))

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self._files.root, {"text": self._column})

    def _lines(self, name: str) -> Iterator[Where]:
        offset = 0
        with opened(self._files.root / name) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield (name, number, offset, len(line))
                offset += len(line)
