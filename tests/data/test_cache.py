"""What was fetched is kept: within a limit, by several processes, and never believed blindly."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers import spawn
from twinflow_train.data.cache import Cache
from twinflow_train.dist import World


def taken(folder: Path) -> int:
    """Add up the sizes of all entries, while none comes or goes; a new name is no new entry."""
    sizes = {}
    with (folder / "taken").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                if entry.name != "taken":
                    sizes[entry.inode()] = entry.stat().st_size
    return sum(sizes.values())


def content(number: int) -> bytes:
    return number.to_bytes(2, "little") * 500


def test_what_was_put_is_found_also_by_another_process(tmp_path: Path) -> None:
    Cache(folder=tmp_path / "new" / "cache", limit=10_000).put("one", b"1")
    other = Cache(folder=tmp_path / "new" / "cache", limit=10_000)
    assert other.get("one") == b"1"
    assert other.get("two") is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_as_good_as_none(tmp_path: Path, damage: str) -> None:
    cache = Cache(folder=tmp_path, limit=10_000)
    cache.put("one", content(1))
    (path,) = tmp_path.glob("*.range")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes({"cut": data[:-1], "flipped": data, "empty": b""}[damage]))
    assert cache.get("one") is None
    cache.put("one", content(1))
    assert cache.get("one") == content(1)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(folder=tmp_path, limit=6_000)
    for number in range(5):
        cache.put(str(number), content(number))
        time.sleep(0.01)
    assert cache.get("0") == content(0)
    cache.put("5", content(5))
    left = [number for number in range(6) if cache.get(str(number))]
    assert {0, 5} <= set(left)
    assert 1 not in left
    assert len(left) == 5


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(folder=tmp_path, limit=1_000)
    cache.put("one", content(1))
    assert cache.get("one") is None
    cache.put("two", b"2")
    assert cache.get("two") == b"2"


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: Path) -> None:
    cache = Cache(folder=tmp_path, limit=2_200)
    for name, age in (("old", 4000), ("new", 0)):
        path = tmp_path / f"{name}.tmp"
        path.write_bytes(bytes(1_000))
        os.utime(path, (time.time() - age,) * 2)
    cache.put("one", content(1))
    assert cache.get("one") == content(1)
    assert not (tmp_path / "old.tmp").exists()
    assert (tmp_path / "new.tmp").exists()


def test_a_folder_that_cannot_be_written_costs_the_cache_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(folder=tmp_path / "file" / "cache", limit=10_000)
    for number in range(3):
        cache.put(str(number), content(number))
    assert cache.get("0") is None
    assert [record.message.count("nothing more goes into") for record in caplog.records] == [1]


def test_what_others_are_about_to_write_has_its_room(tmp_path: Path) -> None:
    cache = Cache(folder=tmp_path, limit=2_200)
    (tmp_path / "another.tmp").write_bytes(bytes(1_500))
    cache.put("one", content(1))
    assert cache.get("one") is None
    assert taken(tmp_path) == 1_500


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Note how much a folder takes, again and again."""
    seen, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(taken(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def use(world: World, folder: str, limit: int) -> int:
    """Put and get in four threads, each rank in an order of its own; count what was wrong."""
    cache, wrong = Cache(folder=Path(folder), limit=limit), []

    def work(thread: int) -> None:
        for k in range(150):
            number = (k * (2 * world.rank + 3) + 17 * thread) % 100
            found = cache.get(str(number))
            if found is None:
                cache.put(str(number), content(number))
            elif found != content(number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


def test_several_processes_stay_below_the_limit(tmp_path: Path) -> None:
    limit = 20_000
    with watched(tmp_path) as seen:
        assert spawn(use, 2, str(tmp_path), limit) == [0, 0]
    assert 10_000 < max(seen) <= limit
    assert not list(tmp_path.glob("*.tmp"))
    kept = sum(path.stat().st_size for path in tmp_path.glob("*.range"))
    assert kept <= int((tmp_path / "taken").read_text()) <= limit
