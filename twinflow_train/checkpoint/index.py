"""The index of a checkpoint: what it holds and where, and whether that is so.

`index.json` lists files with their SHA-256, and for each tensor its ranges as (file, offset,
length); `COMPLETE`, written last, holds the SHA-256 of the index. So nothing that is read goes
unchecked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinflow_train.checkpoint.ranges import DamageError, Piece, RangeFile
from twinflow_train.errors import UserError, listed
from twinflow_train.faults import Record
from twinflow_train.place import Place

VERSION = 1
SEAL = "COMPLETE"
INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class Index:
    """A checkpoint's index, read from its folder.

    files: SHA-256 by name. tensors: by KIND/NAME their "shape", "dtype" and "pieces", each a list
    of file, offset and length. run: what defines the run, as nested plain values.
    """

    folder: Place
    version: int
    progress: Mapping[str, Any]
    updates: int
    run: Mapping[str, Any]
    files: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def read(folder: Place) -> Index:
        """Read and check a folder's index.

        Raises:
            DamageError: it was not written to its end, or has been changed.
            UserError: it is of a newer format.
        """
        text, seal = _part(folder, INDEX), _part(folder, SEAL)
        # What has not this digest is not even parsed.
        if hashlib.sha256(text).hexdigest().encode() not in seal or seal != _seal(text):
            raise DamageError(f"{folder}: {INDEX} is not the one that {SEAL} belongs to")
        try:
            found = json.loads(text)
            if found["version"] <= VERSION:
                return Index._of(folder, found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamageError(f"{folder}: {INDEX} is none ({error!r})") from error
        raise UserError(
            f"{folder} is of format {found['version']}; this program reads up to {VERSION}"
        )

    @staticmethod
    def _of(folder: Place, found: Mapping[str, Any]) -> Index:
        index = Index(
            folder=folder,
            version=found["version"],
            progress={
                **{key: int(found["progress"][key]) for key in ("step", "samples")},
                # Programs before there were any did not write them.
                "faults": vars(Record.of(found["progress"].get("faults", {}))),
            },
            updates=int(found["updates"]),
            run=dict(found["run"]),
            files=dict(found["files"]),
            tensors=dict(found["tensors"]),
        )
        index._refuse_gaps()
        return index

    def _refuse_gaps(self) -> None:
        """Raise DamageError unless every number of every tensor is in exactly one range."""
        for key, entry in self.tensors.items():
            end = 0
            for file, offset, length in sorted(entry["pieces"], key=lambda piece: piece[1]):
                if offset != end or file not in self.files or "/" in file:
                    raise DamageError(f"{self.folder}: {key} is not whole at number {end} ({file})")
                end += length
            if end != math.prod(entry["shape"]):
                raise DamageError(f"{self.folder}: {key} ends after {end} of its numbers")


def damage(index: Index, files: Iterable[str], *, bytewise: bool = True) -> str:
    """Say what is wrong with the first of these files that is not as the index says, else "".

    bytewise: read every byte and compare its SHA-256; else only look at the header.

    Raises:
        OSError: a file is there, but cannot be read.
    """
    wanted: dict[str, list[tuple[str, str, int]]] = {file: [] for file in files}
    for key, entry in index.tensors.items():
        for file, _, length in entry["pieces"]:
            if file in wanted:
                wanted[file].append((key, entry["dtype"], length))
    for file, pieces in wanted.items():
        place = index.folder / file
        try:
            if bytewise and place.sha256() != index.files[file]:
                return f"{place}: its SHA-256 is not the one in {INDEX}"
            with RangeFile.open(place) as opened:
                for key, dtype, length in pieces:
                    stored = opened.tensors.get(key)
                    if stored is None or (str(stored.dtype), stored.length) != (dtype, length):
                        return f"{place}: {key} is not what {INDEX} says"
        except FileNotFoundError:
            return f"{place} is missing"
        except DamageError as error:
            return str(error)
    return ""


def seal(folder: Place, index: Mapping[str, Any]) -> None:
    """Write the index and, after it, what says that the checkpoint is whole."""
    text = json.dumps(index).encode()
    (folder / INDEX).write([text])
    (folder / SEAL).write([_seal(text)])


def build(
    reports: Sequence[Mapping[str, Any]],
    *,
    progress: Mapping[str, Any],
    updates: int,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the ranks' reports of their files together."""
    tensors: dict[str, Any] = {}
    for report in reports:
        for key, (shape, dtype, offset, length) in report["pieces"].items():
            entry = tensors.setdefault(key, {"shape": shape, "dtype": dtype, "pieces": []})
            entry["pieces"].append([report["file"], offset, length])
    return {
        "version": VERSION,
        "progress": progress,
        "updates": updates,
        "run": run,
        "files": {report["file"]: report["sha256"] for report in reports},
        "tensors": tensors,
    }


def reported(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Describe the pieces of a file as `build` takes them."""
    return {
        key: [list(piece.shape), str(piece.dtype), piece.offset, piece.length]
        for key, piece in pieces.items()
    }


def refuse_other_run(
    folder: Place,
    stored: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
) -> None:
    """Raise UserError, naming what differs, if a checkpoint is of a run defined otherwise.

    defaults: of keys that a checkpoint of an older program may lack.
    """
    there = dict(_flatten(defaults)) | dict(_flatten(stored))
    here = dict(_flatten(defaults)) | dict(_flatten(ours))
    changed = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if changed:
        named = listed(f"{key} ({there.get(key)} -> {here.get(key)})" for key in changed)
        raise UserError(
            f"{folder} belongs to another run; changed: {named}. "
            "Choose another name=, undo the change, or begin anew with resume=never"
        )


def refuse_other_model(index: Index, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError, naming tensors, unless they are just those that the engine has."""
    there = {key: tuple(entry["shape"]) for key, entry in index.tensors.items()}
    here = {key: tuple(shape) for key, shape in shapes.items()}
    found = {
        "that it lacks": sorted(here.keys() - there.keys()),
        "too many": sorted(there.keys() - here.keys()),
        "of another shape": [
            f"{key} {there[key]}, here {here[key]}"
            for key in sorted(there.keys() & here.keys())
            if there[key] != here[key]
        ],
    }
    said = [f"{len(keys)} tensors {what}: {listed(keys)}" for what, keys in found.items() if keys]
    if said:
        raise UserError(
            f"{index.folder} is a checkpoint of another model, or with another optim= or average=; "
            f"it has {'; '.join(said)}"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _part(folder: Place, name: str) -> bytes:
    """Read one of the two small files; DamageError if it is not there."""
    try:
        return (folder / name).read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamageError(f"{folder}: {name} is missing") from error


def _seal(index: bytes) -> bytes:
    """Return what says that an index, of the version it names, was written to its end."""
    seal = {"version": json.loads(index)["version"], "index": hashlib.sha256(index).hexdigest()}
    return json.dumps(seal).encode()
