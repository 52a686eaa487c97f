"""Parquet files whose rows are a caption and the bytes of a picture's file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from twinflow_train.encoding.pictures import Size, Unusable, measure
from twinflow_train.encoding.sources import Content, Files, Reader, Source, Where, as_many, some
from twinflow_train.errors import UserError

SUFFIX = ".parquet"
KEPT = 2
"""Row groups in memory: threads that read ahead are at the end of one and the start of the next."""
TOGETHER = 1 << 28
"""Bytes of row groups that are in memory together: of larger ones there is one at a time."""


@dataclass(kw_only=True)
class Parquet(Source):
    """Rows of Parquet files. text, image: their columns; text is a string or a list of strings.

    reference: with `references`, the column of reference images: a file's bytes, or a list of them.
    In place of a file's bytes there may be a structure with the field `bytes`.
    """

    text: str = "text"
    image: str = "image_bytes"
    reference: str = "reference_bytes"

    def open(self) -> ParquetReader:
        """Open the files; UserError without pyarrow, or where a column is missing."""
        files = Files(self.path, (SUFFIX,))
        columns = {"text": self.text, "image": self.image}
        if self.references:
            columns["reference"] = self.reference
        return ParquetReader(files, Rows(files.root, columns), self.references)


class Rows:
    """Columns of the Parquet files in a folder, a row group at a time; UserError without pyarrow.

    columns: their names, by the key of the configuration that chose each.
    """

    def __init__(self, root: Path, columns: dict[str, str]) -> None:
        try:
            # Not a fixed dependency: most sources are not Parquet.
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ModuleNotFoundError as error:
            raise UserError(
                "source.path: reading Parquet takes pyarrow: run "
                "`pip install 'twinflow-train[parquet]'`, or `pip install pyarrow`"
            ) from error
        self._open, self._errors = ParquetFile, (ArrowException, OSError)
        self._root, self._columns = root, columns
        self._groups: OrderedDict[tuple[str, int, tuple[str, ...]], Any] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: str) -> Iterator[Where]:
        """Yield (file, number in the file, row group, number in the group) of each row of a file.

        Raises UserError where a column is missing.
        """
        number = 0
        with self._opened(name) as file:
            for key, column in self._columns.items():
                if column not in file.schema_arrow.names:
                    raise UserError(
                        f"source.{key}: {self._root / name} has no column {column}; it has: "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
            groups = file.metadata.num_row_groups
            lengths = [file.metadata.row_group(group).num_rows for group in range(groups)]
        for group, rows in enumerate(lengths):
            for row in range(rows):
                yield (name, number, group, row)
                number += 1

    def row(self, where: Where, *keys: str) -> dict[str, Any]:
        """Read one row's values, by these keys of the configuration, or all."""
        name, _, group, row = where
        columns = {key: self._columns[key] for key in keys or self._columns}
        with self._lock:
            table = self._group(str(name), int(group), tuple(columns.values()))
        return {key: table.column(column)[int(row)].as_py() for key, column in columns.items()}

    def _group(self, name: str, group: int, columns: tuple[str, ...]) -> Any:
        """Read columns of a row group, or find them among the last that were read."""
        wanted = (name, group, columns)
        if wanted not in self._groups:
            with self._opened(name) as file:
                self._make_room(file.metadata.row_group(group).total_byte_size)
                self._groups[wanted] = file.read_row_group(group, columns=columns)
        self._groups.move_to_end(wanted)
        return self._groups[wanted]

    def _make_room(self, size: int) -> None:
        """Forget row groups that were used longest ago, before one of `size` bytes is read."""
        while self._groups:
            taken = sum(table.nbytes for table in self._groups.values())
            if len(self._groups) < KEPT and taken + size <= TOGETHER:
                return
            self._groups.popitem(last=False)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self._root / name
        try:
            with self._open(path) as file:
                yield file
        except self._errors as error:
            raise UserError(
                f"source.path: {path} is not a whole Parquet file ({error}); copy it again"
            ) from error


class ParquetReader(Reader):
    """Reads rows as pictures with captions."""

    def __init__(self, files: Files, rows: Rows, references: int) -> None:
        self._files, self._rows, self._references = files, rows, references

    def find(self) -> Iterator[Where]:
        """Yield where each row is."""
        for name in self._files.names():
            yield from self._rows.find(name)

    def measure(self, where: Where) -> Size:
        """Read a picture's size from its header."""
        return measure(BytesIO(_picture(self._rows.row(where, "image"))))

    def read(self, where: Where) -> Content:
        """Read a row."""
        row = self._rows.row(where)
        references = _references(row.get("reference"))
        as_many(len(references), self._references)
        return Content(captions=captions(row), picture=_picture(row), references=references)


def captions(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's captions; Unusable if there are none."""
    text = row["text"]
    if isinstance(text, str):
        return some([text])
    if isinstance(text, list) and all(isinstance(each, str | None) for each in text):
        return some([each for each in text if each is not None])
    raise Unusable(f"its text is {text!r:.40}, neither a string nor a list of strings")


def _references(value: Any) -> tuple[bytes, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    files = [_file(each) for each in found]
    if any(file is None for file in files):
        raise Unusable(f"its references are {value!r:.40}, not the bytes of files")
    return tuple(file for file in files if file is not None)


def _picture(row: dict[str, Any]) -> bytes:
    file = _file(row["image"])
    if file is None:
        raise Unusable(f"its image is {row['image']!r:.40}, not the bytes of a file")
    return file


def _file(value: Any) -> bytes | None:
    """Return the bytes of a file, which may stand beside its name in a structure; or None."""
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else None
