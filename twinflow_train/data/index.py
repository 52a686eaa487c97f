"""A shard's index: where in the tar each sample lies, and how long its texts are."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from twinflow_train.data.manifest import Form, ShardFile
from twinflow_train.data.sample import KEY

SHORT = 6
"""Elements of an index's row for a sample without its own null prompt."""


class NotAnIndex(Exception):
    """What is no index of its shard; the message says why."""


class Entry(NamedTuple):
    """Where a sample lies in its tar: begin and size of both members; tokens of each caption.

    null: tokens of its own null prompt, 0 if it has none.
    """

    key: str
    tensors_at: int
    tensors_size: int
    fields_at: int
    fields_size: int
    tokens: tuple[int, ...]
    null: int = 0


def entries_of(text: bytes, shard: ShardFile, form: Form) -> tuple[Entry, ...]:
    """Parse an index; NotAnIndex if it is none, leads out of its shard, or says what cannot be."""
    try:
        found = tuple(_entry(row, shard, form) for row in json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise NotAnIndex(f" ({error})") from error
    if len(found) != shard.samples:
        raise NotAnIndex(
            f" of {shard.file}: it has {len(found)} samples, the manifest says {shard.samples}"
        )
    return found


def _entry(row: Any, shard: ShardFile, form: Form) -> Entry:
    """Make an entry of a row of an index; TypeError or ValueError if it is none, or cannot be."""
    key, *places, tokens = row[:SHORT]
    nulls = row[SHORT:]
    numbers = (*places, *tokens, *nulls)
    fine = all(type(number) is int and number > 0 for number in numbers) and tokens
    tensors_at, tensors_size, fields_at, fields_size = places
    inside = fine and max(tensors_at + tensors_size, fields_at + fields_size) <= shard.bytes
    if not inside or not KEY.fullmatch(key):
        raise ValueError(f"it has {row!r:.200}")
    if form.size(shard.latent_shape, tokens, *nulls) > tensors_size:
        raise ValueError(f"{tensors_size} bytes cannot hold {row!r:.200}")
    return Entry(key, tensors_at, tensors_size, fields_at, fields_size, tuple(tokens), *nulls)


def row_of(entry: Entry) -> tuple[Any, ...]:
    """Make an entry's row of an index, which is shorter without a null prompt of its own."""
    return entry if entry.null else entry[:SHORT]
