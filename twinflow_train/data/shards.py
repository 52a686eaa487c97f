"""Sets of shards, read sample by sample in any order (the format: see `data.writing`)."""

from __future__ import annotations

import hashlib
import json
import tarfile
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError

from twinflow_train.batch import Condition
from twinflow_train.data.manifest import NULL, LatentShape, Manifest, ShardFile
from twinflow_train.data.ranges import Bytes, Cache, Fetched, Mapped, persistently
from twinflow_train.data.sample import KEY, Sample, member_fault, parse
from twinflow_train.errors import UserError
from twinflow_train.place import Place, cause

_REPAIR = "copy the file again or build the set again"


class DataError(UserError):
    """A sample that cannot be used; the message names its shard, its key and the cause."""


class Entry(NamedTuple):
    """Where a sample lies in its tar: begin and size of both members; tokens of each caption."""

    key: str
    tensors_at: int
    tensors_size: int
    fields_at: int
    fields_size: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Open:
    """An open shard."""

    data: Bytes
    entries: tuple[Entry, ...]


class ShardSet:
    """A set of shards in a folder or behind a URL; safe to read from several threads.

    where, option: the place and the config key that named it, for messages.
    keep_open: shards whose index and file stay open.
    cache: keeps ranges that were fetched from behind a URL. attempts: at each of them.
    Raises UserError naming the file, and the sample, that cannot be used.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        option: str = "data.path",
        keep_open: int = 64,
        cache: Cache | None = None,
        attempts: int = 5,
    ) -> None:
        self.place = Place.of(where)
        self.cache, self.attempts = cache, attempts
        self.manifest = Manifest.read(self.place, option=option)
        if self.place.local:
            present = set(self.place.names())
            shards = self.manifest.shards
            for file in [*(shard.file for shard in shards), *(s.index for s in shards), NULL]:
                if file not in present:
                    raise UserError(f"{self.place / file} is missing; {_REPAIR}")
        self.counts = tuple(shard.samples for shard in self.manifest.shards)
        self._ends = tuple(accumulate(self.counts))
        self._opened = lru_cache(maxsize=keep_open)(self._open)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def folder(self) -> Path:
        """The folder of a set on a disk."""
        return Path(self.place.path)

    @cached_property
    def null(self) -> Condition:
        """The null prompt as a condition of one row, in the type it is stored in."""
        place = self.place / NULL
        try:
            found = persistently(place.read, place, self.attempts)
            self._compare(place, found, self.manifest.null_sha256)
            return Condition.pad([safetensors.torch.load(found)["text.0"]])
        except OSError as error:
            raise UserError(f"{place} cannot be read: {cause(error)}; {_REPAIR}") from error
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{place}: not a null prompt ({error!r}); build the set again"
            ) from error

    @property
    def latent_shape(self) -> LatentShape:
        """The one shape (C, H, W) of all latents; UserError if there are several."""
        shapes = list(self.manifest.buckets)
        if len(shapes) > 1:
            raise UserError(
                f"{self.place}: has latents of {len(shapes)} shapes, such as {shapes[0]} and "
                f"{shapes[1]}, where one is wanted: prepare a set of one resolution"
            )
        return shapes[0]

    def start(self, number: int) -> int:
        """Return the index of a shard's first sample."""
        return self._ends[number] - self.counts[number]

    def split(self, index: int) -> tuple[int, int]:
        """Return the shard's number and the sample's place in it; IndexError outside the set."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.place}")
        number = bisect_right(self._ends, index)
        return number, index - self.start(number)

    def entry(self, index: int) -> Entry:
        """Return what the shard's index says of a sample."""
        number, row = self.split(index)
        return self._opened(number).entries[row]

    def read(self, index: int, *, caption: int = 0) -> Sample:
        """Read sample `index`, showing only caption number `caption` modulo its captions.

        Raises:
            DataError: it cannot be used.
        """
        number, row = self.split(index)
        shard, file = self._opened(number), self.manifest.shards[number]
        entry = shard.entries[row]
        begin = min(entry.tensors_at, entry.fields_at)
        end = max(entry.tensors_at + entry.tensors_size, entry.fields_at + entry.fields_size)
        where = f"{self.place / file.file}: sample {entry.key}"
        try:
            data = shard.data.part(begin, end)
            tensors = data[entry.tensors_at - begin :][: entry.tensors_size]
            fields = data[entry.fields_at - begin :][: entry.fields_size]
            return parse(
                entry.key,
                tensors,
                fields,
                caption=caption,
                form=self.manifest.form,
                latent_shape=file.latent_shape,
            )
        except OSError as error:
            raise DataError(f"{where} cannot be read: {cause(error)}; {_REPAIR}") from error
        except ValueError as error:
            raise DataError(f"{where} cannot be read: {error}; {_REPAIR}") from error

    def verify(self) -> None:
        """Compare every file with its checksum and every tar with its index, reading the whole set.

        Raises:
            UserError: names the first file that is not as it should be.
        """
        self.null  # noqa: B018 - compared as it is read
        for number, shard in enumerate(self.manifest.shards):
            place = self.place / shard.file
            try:
                if (found := place.sha256()) != shard.sha256:
                    raise UserError(_unlike(place, found, shard.sha256))
                members = _members(place)
            except OSError as error:
                raise UserError(f"{place}: {cause(error)}; {_REPAIR}") from error
            wanted = [
                member
                for e in self._opened(number).entries
                for member in (
                    (f"{e.key}.safetensors", e.tensors_at, e.tensors_size),
                    (f"{e.key}.json", e.fields_at, e.fields_size),
                )
            ]
            if sorted(members) != sorted(wanted):
                raise UserError(f"{place}: is not what {shard.index} says; build the set again")

    def _open(self, number: int) -> _Open:
        """Open a shard and read its index."""
        shard = self.manifest.shards[number]
        place, index = self.place / shard.file, self.place / shard.index
        try:
            text = persistently(index.read, index, self.attempts)
            self._compare(index, text, shard.index_sha256)
            return _Open(data=self._bytes(place, shard), entries=_entries(text, shard, index))
        except OSError as error:
            raise DataError(f"{place}: {cause(error)}; {_REPAIR}") from error

    def _bytes(self, place: Place, shard: ShardFile) -> Bytes:
        if not place.local:
            return Fetched(place=place, cache=self.cache, attempts=self.attempts)
        mapped = Mapped(Path(place.path))
        if mapped.size != shard.bytes:
            raise DataError(
                f"{place}: has {mapped.size} bytes, the manifest says {shard.bytes}; {_REPAIR}"
            )
        return mapped

    @staticmethod
    def _compare(place: Place, found: bytes, expected: str) -> None:
        if (digest := hashlib.sha256(found).hexdigest()) != expected:
            raise DataError(_unlike(place, digest, expected))


def _unlike(place: Place, found: str, expected: str) -> str:
    return f"{place}: SHA-256 is {found}, the manifest says {expected}; {_REPAIR}"


def _entries(text: bytes, shard: ShardFile, place: Place) -> tuple[Entry, ...]:
    """Parse an index; DataError if it is none, or leads out of its shard."""
    try:
        found = tuple(_entry(row, shard) for row in json.loads(text))
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: not an index ({error}); build the set again") from error
    if len(found) != shard.samples:
        raise DataError(
            f"{place}: not an index of {shard.file}: it has {len(found)} samples, the manifest "
            f"says {shard.samples}; build the set again"
        )
    return found


def _entry(row: Any, shard: ShardFile) -> Entry:
    """Make an entry of a row of an index; TypeError or ValueError if it is none."""
    key, *places, tokens = row
    fine = all(type(number) is int and number > 0 for number in (*places, *tokens)) and tokens
    tensors_at, tensors_size, fields_at, fields_size = places
    inside = fine and max(tensors_at + tensors_size, fields_at + fields_size) <= shard.bytes
    if not inside or not KEY.fullmatch(key):
        raise ValueError(f"it has {row!r:.200}")
    return Entry(key, tensors_at, tensors_size, fields_at, fields_size, tuple(tokens))


def _members(place: Place) -> list[tuple[str, int, int]]:
    """List name, begin and size of a tar's members; refuse names and kinds that no shard has."""
    found = []
    try:
        with place.driver.open(place.path, "rb") as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if fault := member_fault(member.name, regular=member.isreg()):
                    raise UserError(f"{place}: {fault}")
                found.append((member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise UserError(f"{place}: not a whole tar ({error}); {_REPAIR}") from error
    return found
