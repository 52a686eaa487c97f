"""How often files are opened and manifests are read: once, as long as they are in use."""

from __future__ import annotations

import os
import resource
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from tests.data.server import serve
from tests.data.tools import Shard, make_shards
from twinflow_train.data import ranges, shards
from twinflow_train.data.loader import Part, Shards

SHAPES = ((1, 2, 2), (1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 4, 1), (2, 2, 1))
EACH, SAMPLES, BATCH = 6, 8, 8
SET: list[Shard] = [(shape, [2] * SAMPLES) for _ in range(EACH) for shape in SHAPES]
"""Six sizes of six shards each."""
EPOCH = len(SET) * SAMPLES // BATCH


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each tar is opened."""
    found: Counter[str] = Counter()

    class Counting(ranges.OnDisk):
        def __init__(self, path: Path) -> None:
            found[path.name] += 1
            super().__init__(path)

    monkeypatch.setattr(shards, "OnDisk", Counting)
    return found


def open_now(folder: Path) -> int:
    """Count this process's open files in a folder."""
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


def show(data: Shards, steps: int, folder: Path) -> int:
    """Show some steps, all lanes of them; return how many files were ever open at once."""
    stream, most = data.stream(seed=0, batch=BATCH), 0
    with closing(data.batches(stream, rows=[range(BATCH)], groups=[BATCH], step=0)) as found:
        for _ in islice(found, steps):
            most = max(most, open_now(folder))
    return most


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_shard_in_use_stays_open(tmp_path: Path, opened: Counter[str], prefetch: int) -> None:
    """With a window of half the shards of each size; two of them stay open."""
    path = make_shards(tmp_path / "set", SET)
    data = Shards(path=str(path), window=EACH // 2, prefetch=prefetch)
    assert show(data, 2 * EPOCH, path) == len(SET)
    assert set(opened.values()) == {1}
    assert len(opened) == len(SET)


def test_no_more_files_are_open_than_a_process_may_have(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them, shared by two sets."""
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: (40, 40)}.get)
    one, two = (make_shards(tmp_path / name, SET) for name in ("one", "two"))
    data = Shards(path=str(one), mix=[Part(path=str(two))], window=EACH, prefetch=0)
    assert show(data, 2 * EPOCH, tmp_path) == 20
    assert len(opened) == len(SET)


def test_a_manifest_is_read_once(tmp_path: Path) -> None:
    """However often a run asks: to check, to name what it shows, to train and to evaluate."""
    make_shards(tmp_path / "train", SET[:6])
    make_shards(tmp_path / "more", SET[:6])
    make_shards(tmp_path / "heldout", SET[:1])
    with serve(tmp_path) as server:
        data = Shards(
            path=f"{server.url}/train",
            mix=[Part(path=f"{server.url}/more")],
            heldout=f"{server.url}/heldout",
        )
        for _ in range(2):
            data.stream(seed=0, batch=BATCH).plan(0, [0], groups=[BATCH])
            assert len(data.identity()["contents"]) == len(data.train()) == 2
            assert len(data.held_out()) == SAMPLES
        asked = sorted(request.file for request in server.asked("manifest.json"))
    assert asked == [f"{name}/manifest.json" for name in ("heldout", "more", "train")]
