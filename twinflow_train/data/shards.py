"""Sets of shards, read sample by sample in any order (the format: see `data.writing`)."""

from __future__ import annotations

import hashlib
import resource
import tarfile
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from twinflow_train.batch import Condition, Embedding
from twinflow_train.data.cache import Cache
from twinflow_train.data.index import Entry, NotAnIndex, entries_of
from twinflow_train.data.kept import Kept
from twinflow_train.data.manifest import NAME, NULL, LatentShape, Manifest, ShardFile
from twinflow_train.data.ranges import File, NoRanges, OnDisk, Remote
from twinflow_train.data.sample import (
    TYPES,
    Layout,
    Room,
    Sample,
    captions_of,
    header_of,
    layout,
    member_fault,
    parse,
)
from twinflow_train.errors import UserError
from twinflow_train.place import Place, cause

LARGEST = 1 << 16
"""Files that stay open where there is no limit."""
LAYOUTS = 4096
"""How many layouts of samples are remembered."""
_REPAIR = "copy the file again or build the set again"
_RANGES = "serve the set from where ranges of a file can be asked for, or copy it to a disk"
_AGAIN = "start again when it answers, or raise data.attempts"


class DataError(UserError):
    """A sample that cannot be used; the message names its shard, its key and the cause."""


def open_files() -> int:
    """Return how many files shards may hold open: half of what the system lets a process have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return LARGEST if limit == resource.RLIM_INFINITY else max(limit // 2, 1)


class Unreached(DataError):
    """A file that cannot be read now, perhaps by this process alone; another time it may be."""


class ShardSet:
    """A set of shards in a folder or behind a URL; safe to read from several threads.

    where, option: the place and the config key that named it, for messages.
    keep_open: shards of each latent shape whose indexes are kept, and that stay open, but of all
        shapes together no more than most_open, by default `open_files`.
    cache: keeps what was fetched from behind a URL. attempts: at each file or range there.
    Raises UserError naming the file, and the sample, that cannot be used.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        option: str = "data.path",
        keep_open: int = 64,
        most_open: int | None = None,
        cache: Cache | None = None,
        attempts: int = 5,
    ) -> None:
        self.place = Place.of(where)
        self._cache, self._attempts = cache, attempts
        text = Manifest.fetch(self.place, option=option, attempts=attempts)
        self.manifest_sha256 = hashlib.sha256(text).hexdigest()
        self.manifest = Manifest.parse(text, self.place / NAME)
        if self.place.local:
            self._look()
        self.counts = tuple(shard.samples for shard in self.manifest.shards)
        self._ends = tuple(accumulate(self.counts))
        wanted = keep_open * len(self.manifest.buckets)
        self._entries = Kept(self._read_index, most=wanted)
        self._files = Kept(self._open, most=min(wanted, most_open or open_files()))
        self._layouts: dict[object, Layout] = {}

    def _look(self) -> None:
        """Look whether the files on the disk are there, each tar as large as it was: UserError."""
        present = set(self.place.names())
        for file in [*(shard.index for shard in self.manifest.shards), NULL]:
            if file not in present:
                raise UserError(f"{self.place / file} is missing; {_REPAIR}")
        for shard in self.manifest.shards:
            place = self.place / shard.file
            try:
                size = Path(place.path).stat().st_size
            except FileNotFoundError as error:
                raise UserError(f"{place} is missing; {_REPAIR}") from error
            except OSError as error:
                raise UserError(f"{place} cannot be read: {cause(error)}; {_REPAIR}") from error
            if size != shard.bytes:
                raise UserError(f"{place}: {_another_size(size, shard)}; {_REPAIR}")

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
            found = self._whole(NULL, self.manifest.null_sha256)
            tensors, form = safetensors.torch.load(found), self.manifest.form
            text, pooled = tensors["text.0"], tensors["pooled.0"] if form.pooled_width else None
            shapes = [tuple(text.shape[1:]), *(tuple(p.shape) for p in (pooled,) if p is not None)]
            wanted = [(width,) for width in (form.text_width, form.pooled_width) if width]
            if shapes != wanted or not len(text) or text.dtype not in TYPES.values():
                raise ValueError(f"text.0 is {text.dtype} {tuple(text.shape)}")
            return Condition.of([Embedding(text, pooled)])
        except OSError as error:
            raise UserError(self._unreadable(f"{place}", error)) from error
        except UserError:
            raise
        except (SafetensorError, KeyError, ValueError) as error:
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

    def has_index(self, number: int) -> bool:
        """Tell whether a shard's index is there, or on its way."""
        return number in self._entries

    def index(self, number: int) -> tuple[Entry, ...]:
        """Return a shard's index; DataError if it cannot be read."""
        return self._entries.get(number)

    def read(self, index: int, *, caption: int = 0) -> Sample:
        """Read sample `index`, showing only caption number `caption` modulo its captions.

        Raises:
            DataError: it cannot be used.
        """
        number, row = self.split(index)
        entry = self._entries.get(number)[row]
        begin = min(entry.tensors_at, entry.fields_at)
        end = max(entry.tensors_at + entry.tensors_size, entry.fields_at + entry.fields_size)
        try:
            copy = self._files.get(number).part(begin, end)
            tensors, fields = bytearray(entry.tensors_size), bytearray(entry.fields_size)
            copy(entry.tensors_at - begin, [memoryview(tensors)])
            copy(entry.fields_at - begin, [memoryview(fields)])
            return parse(
                entry.key,
                tensors,
                fields,
                caption=caption,
                form=self.manifest.form,
                latent_shape=self.manifest.shards[number].latent_shape,
            )
        except (OSError, ValueError, MemoryError) as error:
            raise self.fault(number, entry, error) from error

    def copy(self, number: int, entry: Entry, room: Room, *, caption: int) -> None:
        """Copy the tensors of a shard's sample to where there is room, with one caption.

        Latents are not looked at: see `sample.not_finite`.

        Raises:
            DataError: it cannot be used.
        """
        shape, chosen = self.manifest.shards[number].latent_shape, caption % len(entry.tokens)
        # Samples with equally long texts have equal headers, nearly always.
        like = (shape, entry.tensors_size, entry.tokens, entry.null, chosen)
        known = self._layouts.get(like)
        try:
            copy = self._files.get(number).part(
                entry.tensors_at, entry.tensors_at + entry.tensors_size
            )
            if known and known.copy(copy, room):
                return
            header = header_of(copy, entry.tensors_size)
            found = self._layout(number, entry, header, chosen)
            found.copy(copy, room)
        except (OSError, ValueError) as error:
            raise self.fault(number, entry, error) from error
        if len(self._layouts) >= LAYOUTS:
            self._layouts.clear()
        self._layouts[like] = found

    def _layout(self, number: int, entry: Entry, header: bytes, caption: int) -> Layout:
        """Find a sample's tensors with one caption; ValueError if they are not as promised."""
        form, shape = self.manifest.form, self.manifest.shards[number].latent_shape
        found = layout(header, entry.tensors_size, caption=caption, form=form, latent_shape=shape)
        promised = {f"text.{caption}": entry.tokens[caption]}
        promised |= {"null.0": entry.null} if form.own_null else {}
        for name, said in promised.items():
            if (tokens := found.tensors[name].shape[0]) != said:
                raise ValueError(f"it has {tokens} tokens, the index says {said}")
        return found

    def _check(self, number: int, entry: Entry) -> None:
        """Compare a sample with the manifest's form and its index; DataError if it is another."""
        try:
            file = self._files.get(number)
            copy = file.part(entry.tensors_at, entry.tensors_at + entry.tensors_size)
            header, fields = header_of(copy, entry.tensors_size), bytearray(entry.fields_size)
            for caption in range(len(entry.tokens)):
                self._layout(number, entry, header, caption)
            file.part(entry.fields_at, entry.fields_at + entry.fields_size)(0, [memoryview(fields)])
            if (many := len(captions_of(fields)[0])) != len(entry.tokens):
                raise ValueError(f"it has {many} captions, the index says {len(entry.tokens)}")
        except (OSError, ValueError, MemoryError) as error:
            raise self.fault(number, entry, error) from error

    def fault(self, number: int, entry: Entry, error: Exception) -> DataError:
        """Say that a shard's sample cannot be used."""
        where = self.place / self.manifest.shards[number].file
        return DataError(self._unreadable(f"{where}: sample {entry.key}", error))

    def _unreadable(self, what: str, error: Exception) -> str:
        advice = _AGAIN if _passing(error) and not self.place.local else _REPAIR
        advice = _RANGES if isinstance(error, NoRanges) else advice
        return f"{what} cannot be read: {cause(error)}; {advice}"

    def verify(self) -> None:
        """Compare every file with its checksum, every tar with its index, samples with the form.

        Reads the whole set.

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
                for e in self._entries.get(number)
                for member in (
                    (f"{e.key}.safetensors", e.tensors_at, e.tensors_size),
                    (f"{e.key}.json", e.fields_at, e.fields_size),
                )
            ]
            if sorted(members) != sorted(wanted):
                raise UserError(f"{place}: is not what {shard.index} says; build the set again")
            for entry in self._entries.get(number):
                self._check(number, entry)

    def _read_index(self, number: int) -> tuple[Entry, ...]:
        """Read and parse a shard's index."""
        shard = self.manifest.shards[number]
        place = self.place / shard.index
        try:
            found = entries_of(
                self._whole(shard.index, shard.index_sha256), shard, self.manifest.form
            )
        except OSError as error:
            kind = Unreached if _passing(error) else DataError
            raise kind(self._unreadable(f"{place}", error)) from error
        except NotAnIndex as error:
            raise DataError(f"{place}: not an index{error}; build the set again") from error
        return found

    def _open(self, number: int) -> File:
        """Open a shard; OSError if it is not what it was."""
        shard = self.manifest.shards[number]
        if not self.place.local:
            return self._remote(shard.file, shard.sha256)
        found = OnDisk(Path((self.place / shard.file).path))
        if found.size != shard.bytes:
            raise OSError(_another_size(found.size, shard))
        return found

    def _whole(self, file: str, sha256: str) -> bytes:
        """Read a small file of a known checksum; UserError if it has another one."""
        place = self.place / file
        found = place.read() if self.place.local else self._remote(file, sha256).whole()
        if (digest := hashlib.sha256(found).hexdigest()) != sha256:
            raise DataError(_unlike(place, digest, sha256))
        return found

    def _remote(self, file: str, sha256: str) -> Remote:
        place = self.place / file
        return Remote(place=place, sha256=sha256, cache=self._cache, attempts=self._attempts)


def _another_size(size: int, shard: ShardFile) -> str:
    return f"it has {size} bytes, the manifest says {shard.bytes}"


def _passing(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def _unlike(place: Place, found: str, expected: str) -> str:
    return f"{place}: SHA-256 is {found}, the manifest says {expected}; {_REPAIR}"


def _members(place: Place) -> list[tuple[str, int, int]]:
    """List name, begin and size of a tar's members; refuse names and kinds that no shard has."""
    found = []
    try:
        with (
            place.driver.open(place.path, "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                if fault := member_fault(member.name, regular=member.isreg()):
                    raise UserError(f"{place}: {fault}")
                found.append((member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise UserError(f"{place}: not a whole tar ({error}); {_REPAIR}") from error
    return found
