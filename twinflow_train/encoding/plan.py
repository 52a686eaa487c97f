"""The plan: which items make which shard. It is made once, and every worker reads the same."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from twinflow_train.encoding.images import Images
from twinflow_train.encoding.pictures import Size, Unusable
from twinflow_train.encoding.sources import Item, Reader
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file

T = TypeVar("T")
R = TypeVar("R")

PLAN = "plan.jsonl"
LEFT_OUT = "left_out.jsonl"
AHEAD = 8
"""Items a thread that are read ahead of the one that is wanted."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An item that is left out, and why."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard to make: its number, its size and its items."""

    number: int
    size: Size
    items: tuple[Item, ...]

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """All shards to make, in the file that `make_plan` wrote; each line is one."""

    path: Path
    _starts: tuple[int, ...]

    @staticmethod
    def read(keeping: Path) -> Plan:
        """Open the plan and find its lines."""
        starts, offset = [], 0
        with (keeping / PLAN).open("rb") as file:
            for line in file:
                starts.append(offset)
                offset += len(line)
        return Plan(keeping / PLAN, tuple(starts))

    def __len__(self) -> int:
        return len(self._starts)

    def task(self, number: int) -> Task:
        """Read one shard's task; safe to call from several threads."""
        with self.path.open("rb") as file:
            file.seek(self._starts[number])
            line = file.readline()
        try:
            said = json.loads(line)
            items = (Item(number=each[0], where=tuple(each[1:])) for each in said["items"])
            return Task(number=number, size=Size(*said["size"]), items=tuple(items))
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"{self.path} is damaged in line {number + 1} ({error!r}); prepare into another "
                "folder="
            ) from error


def make_plan(
    keeping: Path,
    reader: Reader,
    images: Images,
    *,
    wanted: Callable[[Item], bool],
    agree: Callable[[], None],
    multiple: int,
    samples_per_shard: int,
    loaders: int,
    show: bool,
) -> None:
    """Choose each item's size, from the headers of pictures, and deal items of one size to shards.

    Two workers that plan at once write the same. wanted: tells of an item whether it belongs into
    the set. agree: is called when there is a plan, before it takes its place. show: a progress bar.

    Raises:
        UserError: the source has nothing that is wanted, or nothing of it can be used.
    """
    sizes = images.sizes_for(multiple)

    def place(item: Item) -> Size | Skipped:
        try:
            return images.place(item, reader, sizes)
        except Unusable as reason:
            return Skipped(number=item.number, name=item.name, reason=str(reason))

    items = (Item(number=number, where=where) for number, where in enumerate(reader.find()))
    shown = tqdm(
        filter(wanted, items), desc="planning", unit="item", disable=not show, mininterval=1
    )
    left_out: list[Skipped] = []
    with ThreadPoolExecutor(loaders) as pool, whole_file(keeping / PLAN) as unfinished:
        placed = _kept(ahead(pool, place, shown, loaders * AHEAD), left_out)
        with unfinished.open("w") as file:
            for size, shard in _shards(placed, samples_per_shard):
                lines = [[item.number, *item.where] for item in shard]
                file.write(json.dumps({"size": size, "items": lines}) + "\n")
        if not unfinished.stat().st_size:
            first = f", {left_out[0].name} because {left_out[0].reason}" if left_out else ""
            raise UserError(
                f"source.path: there is nothing to prepare for {keeping.parent}: "
                f"{len(left_out)} items were found and left out{first}"
            )
        write_lines(keeping / LEFT_OUT, left_out)
        agree()


def _kept(
    placed: Iterable[tuple[Item, Size | Skipped]], left_out: list[Skipped]
) -> Iterator[tuple[Item, Size]]:
    """Pass on what has a size, and put the rest into `left_out`."""
    for item, size in placed:
        if isinstance(size, Skipped):
            left_out.append(size)
        else:
            yield item, size


def _shards(
    placed: Iterable[tuple[Item, Size]], samples_per_shard: int
) -> Iterator[tuple[Size, list[Item]]]:
    """Collect items of one size; those that fill no shard come last."""
    pending: dict[Size, list[Item]] = {}
    for item, size in placed:
        pending.setdefault(size, []).append(item)
        if len(pending[size]) == samples_per_shard:
            yield size, pending.pop(size)
    yield from sorted(pending.items())


def ahead(
    pool: Executor, function: Callable[[T], R], items: Iterable[T], depth: int
) -> Iterator[tuple[T, R]]:
    """Yield (item, function(item)) in order, while threads work up to `depth` items ahead."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > depth:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def write_lines(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write what was left out, a line each."""
    with whole_file(path) as unfinished, unfinished.open("w") as file:
        for each in skipped:
            file.write(json.dumps([each.number, each.name, each.reason]) + "\n")


def read_lines(path: Path) -> list[Skipped]:
    """Read what `write_lines` wrote; UserError if it is not there, or damaged."""
    try:
        with path.open() as file:
            return [Skipped(number=n, name=name, reason=r) for n, name, r in map(json.loads, file)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}, the list of what the plan left out, cannot be read ({error}); bring it back, "
            "or leave an empty file of that name in its place"
        ) from error
