"""Shards are written while others are made, and each once, whoever else makes it too."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from tests.encoding.jobs import pipeline, run, settings
from tests.encoding.tools import write_folder
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding import job
from twinflow_train.encoding.folder import Folder, FolderReader
from twinflow_train.encoding.making import Maker
from twinflow_train.encoding.plan import Task
from twinflow_train.encoding.records import LOCK, Made, publish
from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.sources import Content, Where

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("locked", flush=True)
sys.stdin.read()
"""
"""Locks a byte of a file until it is told to end."""


@pytest.fixture
def prepared(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    """Eleven pictures to be put into four shards."""
    source = Folder(path=str(write_folder(tmp_path / "source", range(11))))
    return settings(tmp_path / "set", pipeline(tmp_path_factory), source=source)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Tell all files of a set apart from any that would take their places."""
    found = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def test_a_worker_of_the_same_number_replaces_nothing_that_is_on_record(
    prepared: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has made half a shard when another does all the work, from the plan on."""
    folder, read, once = Path(prepared.folder), FolderReader.read, threading.Lock()
    written: dict[str, tuple[int, int]] = {}

    def interrupted(reader: FolderReader, where: Where) -> Content:
        if once.acquire(blocking=False):
            assert run(prepared).shards == 4
            written.update(files(folder))
        return read(reader, where)

    monkeypatch.setattr(FolderReader, "read", interrupted)
    late = run(prepared)
    assert (late.shards, late.samples, late.left) == (0, 0, 0)
    after = files(folder)
    for rewritten in ("manifest.json", "skipped.jsonl"):  # by either, and they are the same
        del written[rewritten], after[rewritten]
    assert after == written
    shards = ShardSet(folder)
    shards.verify()
    assert len(shards) == 11


def test_who_publishes_a_shard_keeps_others_out(prepared: Preparation) -> None:
    """Another process is just about to write the third one."""
    records = Path(prepared.keeping)
    records.mkdir(parents=True)
    hold = [sys.executable, "-c", HOLD, str(records / LOCK), "2"]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        thread = threading.Thread(target=run, args=(prepared,))
        thread.start()
        deadline = time.monotonic() + 60
        while not (records / "000001.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        assert not list(Path(prepared.folder).glob("000002.*"))
        other.communicate()
        thread.join()
    assert len(ShardSet(prepared.folder)) == 11


def test_a_shard_is_written_while_the_next_is_made_and_one_waits_at_most(
    prepared: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, making = Maker.make, [threading.Event() for _ in range(5)]
    made: list[weakref.ref[Made]] = []
    alive: list[int] = []

    def watched(maker: Maker, task: Task) -> Made:
        making[task.number].set()
        alive.append(sum(one() is not None for one in made))
        found = make(maker, task)
        made.append(weakref.ref(found))
        return found

    def slow(one: Made, settings: Preparation) -> int | None:
        last = one.task.number == 3
        assert last or making[one.task.number + 1].wait(60), "nothing is made meanwhile"
        return publish(one, settings)

    monkeypatch.setattr(Maker, "make", watched)
    monkeypatch.setattr(job, "publish", slow)
    assert run(prepared).samples == 11
    assert alive == [0, 1, 1, 1]
    ShardSet(prepared.folder).verify()
