"""Finished shards and their records: each is put there once, whoever else is making it too."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinflow_train.data.manifest import Form, LatentShape, ShardFile
from twinflow_train.data.sample import Sample
from twinflow_train.data.writing import write_shard
from twinflow_train.encoding.plan import Skipped, Task
from twinflow_train.encoding.settings import Preparation
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file

LOCK = "lock"
"""File whose bytes stand for shards, and one more for the null prompt: who writes locks one."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a task; its file is written last, so a shard with a record is whole.

    shard: its entry in the manifest, None where every item was left out. form: as in the manifest.
    """

    shard: ShardFile | None
    form: Form
    skipped: tuple[Skipped, ...]

    @staticmethod
    def path(keeping: Path, number: int) -> Path:
        """Name the file of a task's record."""
        return keeping / f"{number:06d}.json"

    @staticmethod
    def read(keeping: Path, number: int) -> Record:
        """Read a task's record."""
        said: dict[str, Any] = json.loads(Record.path(keeping, number).read_text())
        return Record(
            shard=None if said["shard"] is None else ShardFile.of(said["shard"]),
            form=Form(**said["form"]),
            skipped=tuple(Skipped(**each) for each in said["skipped"]),
        )

    def whole(self, folder: Path) -> bool:
        """Tell whether its shard's files are there, the tar as large as it was."""
        if self.shard is None:
            return True
        tar = folder / self.shard.file
        sized = tar.is_file() and tar.stat().st_size == self.shard.bytes
        return sized and (folder / self.shard.index).is_file()

    def write(self, keeping: Path, number: int) -> None:
        """Write it: the shard is finished."""
        with whole_file(Record.path(keeping, number)) as unfinished:
            unfinished.write_text(json.dumps(asdict(self)) + "\n")


def finished(settings: Preparation, number: int) -> bool:
    """Tell whether a task's shard needs no more work: its record can be read, its files are there.

    A shard whose files or record somebody damaged is made again.
    """
    try:
        return Record.read(settings.keeping, number).whole(Path(settings.folder))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return False


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was made of a task: its samples, of one form and latent shape, and what was left out."""

    task: Task
    form: Form
    latent_shape: LatentShape
    samples: Sequence[Sample]
    skipped: Sequence[Skipped]


def publish(made: Made, settings: Preparation) -> int | None:
    """Write a task's shard and its record, in this order; return how many samples it has.

    What another worker has put on record is left as it is: None.

    Raises:
        UserError: it cannot be written.
    """
    keeping, number = settings.keeping, made.task.number
    path = Path(settings.folder) / f"{made.task.stem}.tar"
    with alone(keeping, number, writing=path):
        if finished(settings, number):
            return None
        shard = None
        if made.samples:
            shard = write_shard(path, made.samples, made.form, latent_shape=made.latent_shape)
        record = Record(shard=shard, form=made.form, skipped=tuple(made.skipped))
        record.write(keeping, number)
    return len(made.samples)


@contextmanager
def alone(keeping: Path, number: int, *, writing: Path) -> Iterator[None]:
    """Keep out other processes, on this node or another, that ask for the same number.

    writing: what is written meanwhile; UserError if it cannot be.
    """
    try:
        with (keeping / LOCK).open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, number)
            yield
    except OSError as error:
        raise UserError(
            f"folder: {writing} cannot be written ({error.strerror}); make room and start again: "
            "what is finished stays"
        ) from error
