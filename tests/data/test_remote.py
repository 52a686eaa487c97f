"""Sets behind a URL: a slow, narrow server is used to the full, once, and no more than needed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data.ranks import Job, Seen, take, take_all, together
from tests.data.server import Server, serve
from tests.data.tools import Shard, make_shards
from tests.helpers import spawn
from twinflow_train.data import kept, ranges
from twinflow_train.data.cache import Cache
from twinflow_train.data.shards import DataError, ShardSet
from twinflow_train.dist import World
from twinflow_train.errors import UserError

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
RATE = 4_000_000
SHARDS: list[Shard] = [((8, 32, 32), [38, 42, 41, 39, 40, 40])] * 16
"""96 samples of 58 kB or so."""
EPOCH, BATCH = 96, 8
SAMPLE = 8 * 32 * 32 * 2 + 40 * 512 * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("remote") / "set", SHARDS, width=512)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder) as found:
        yield found


def job(where: str, *, epochs: int = 1, **options: object) -> Job:
    """Show some epochs."""
    whole = {"path": where, "window": 8, "attempts": 2, **options}
    return Job(options=whole, batch=BATCH, steps=epochs * EPOCH // BATCH)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slow_and_narrow_server_is_used_to_the_full(server: Server, ranks: int) -> None:
    """At four fifths of its rate, reading hardly more than is shown; the best of three attempts."""
    server.latency, server.rate = 0.05, RATE
    used = []
    for _ in range(3):
        server.requests, server.sent = [], 0
        seen = spawn(take, ranks, job(server.url, epochs=4))
        assert not any(one.error for one in seen)
        assert server.sent < 1.2 * 4 * EPOCH * SAMPLE
        used.append(server.sent / (server.last - server.asked(".tar")[0].when) / RATE)
        if used[-1] > 0.8:
            return
    pytest.fail(f"parts of the rate that were used: {used}")


def shown(seen: list[Seen], steps: int) -> list[list[str]]:
    return [together(seen, step) for step in range(steps)]


def test_what_is_behind_a_url_is_what_is_on_a_disk(folder: Path, server: Server) -> None:
    here, there = job(str(folder)), job(server.url)
    found = spawn(take_all, 2, [here, there])
    local, remote = ([one[n] for one in found] for n in range(2))
    assert shown(remote, here.steps) == shown(local, here.steps)
    keys = [key for step in shown(remote, here.steps) for key in step]
    assert sorted(keys) == [f"s-{n:05d}" for n in range(EPOCH)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_epoch_that_is_kept_is_fetched_once(
    server: Server, tmp_path: Path, prefetch: int
) -> None:
    """Also by other processes; and what is damaged is fetched again."""
    one = job(server.url, epochs=2, cache=str(tmp_path), prefetch=prefetch)
    first = spawn(take, 2, one)
    ranges = [(r.file, r.begin) for r in server.asked(".tar")]
    assert len(set(ranges)) == EPOCH
    assert len(ranges) <= EPOCH + 2 * BATCH  # what two epochs show at nearly the same time
    assert len({r.file for r in server.asked(".index.json")}) == len(SHARDS)
    server.requests = []
    again = spawn(take, 2, one)
    assert shown(again, one.steps) == shown(first, one.steps)
    assert {r.file for r in server.requests} == {"manifest.json"}
    damaged = sorted(tmp_path.glob("*.range"))[::10]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    server.requests = []
    again = spawn(take, 2, one)
    assert shown(again, one.steps) == shown(first, one.steps)
    asked = [r for r in server.requests if r.file != "manifest.json"]
    assert len(damaged) <= len(asked) <= 2 * len(damaged)


def test_a_cache_too_small_for_an_epoch_keeps_its_limit(server: Server, tmp_path: Path) -> None:
    one = job(server.url, epochs=2, cache=str(tmp_path), cache_gb=0.002)
    assert not any(seen.error for seen in spawn(take, 2, one))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.*")]
    assert 1_000_000 < sum(sizes) <= 2_000_000


def test_another_set_in_the_same_place_is_not_taken_from_the_cache(
    server: Server, tmp_path: Path
) -> None:
    one = job("", cache=str(tmp_path / "cache"))
    for name in ("a", "b"):
        folder = make_shards(tmp_path / name / "set", [((1, 2, 2), [2] * 16)], name=name)
        with serve(folder) as moved:
            options = {**one.options, "path": moved.url}
            (seen,) = spawn(take, 1, Job(options=options, batch=8, steps=2))
        assert {key[0] for keys in seen.keys for key in keys} == {name}


def test_a_set_that_lies_about_its_bytes_is_not_given_those_of_another(tmp_path: Path) -> None:
    """Its manifest claims the checksum of the other's."""
    cache = Cache(folder=tmp_path / "cache", limit=10**6)
    make_shards(tmp_path / "honest", [((1, 2, 2), [2] * 4)])
    lying = Path(shutil.copytree(tmp_path / "honest", tmp_path / "liar")) / "000000.tar"
    lying.write_bytes(lying.read_bytes().replace(b"\x80\x3f", b"\x00\x40"))
    with serve(tmp_path) as server:
        sets = [ShardSet(f"{server.url}/{name}", cache=cache) for name in ("honest", "liar")]
        for _ in range(2):
            assert [float(one.read(1).image.mean()) for one in sets] == [1, 2]


@pytest.mark.parametrize("file", ["000001.tar", "000001.index.json"])
def test_a_shard_that_does_not_answer_costs_one_round_of_attempts_for_a_while(
    server: Server, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(kept, "HELD", 2.0)
    server.errors[file] = 3
    shards = ShardSet(server.url, attempts=2)
    wanted = range(shards.start(1), shards.start(2))
    for index in wanted:
        with pytest.raises(DataError, match="500"):
            shards.read(index)
    assert len(server.asked(file)) == 2
    assert shards.read(0).key == "s-00000"
    time.sleep(2.0)
    assert [shards.read(index).key for index in wanted] == [f"s-{n:05d}" for n in wanted]


def test_a_server_that_is_silent_does_not_hold_a_step_for_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there are many attempts, and many samples that could be shown instead."""
    server.stalls = {f"{n:06d}.tar": 3.0 for n in range(len(SHARDS))}
    monkeypatch.setattr(ranges, "LONGEST", 1)
    one = job(server.url, attempts=99, on_error="skip", threads=8)
    began = time.monotonic()
    seen = take(ALONE, replace(one, patience=1))
    assert "samples that were tried in its place cannot be used either" in seen.error
    assert "no answer in 1 seconds" in seen.error
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_ranks_that_cannot_agree_on_an_order_end_alike(server: Server, on_error: str) -> None:
    """They share a lane, and the index fails for one of them alone."""
    server.errors["000003.index.json"] = 1
    one = job(server.url, lanes=1, attempts=1, on_error=on_error, prefetch=0)
    found = spawn(take, 2, one)
    assert len({one.error for one in found}) == 1
    assert re.search(r"000003\.index\.json cannot be read: .*; start again when", found[0].error)


def test_a_server_without_ranges_is_refused(server: Server) -> None:
    server.ranges = False
    shards = ShardSet(server.url)
    with pytest.raises(DataError, match=r"answer range requests; serve the set from where"):
        shards.read(0)
    assert len(server.asked(".tar")) == 1


def test_a_set_that_is_not_there_names_its_key(server: Server) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*/nowhere does not exist; build shards"):
        ShardSet(f"{server.url}/nowhere")


def test_verify_reads_what_is_behind_a_url(server: Server, tmp_path: Path) -> None:
    ShardSet(server.url).verify()
    bad = make_shards(tmp_path / "bad", SHARDS[:2])
    path = bad / "000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with (
        serve(bad) as other,
        pytest.raises(UserError, match=r"000001\.tar: SHA-256 is .*; copy the file again"),
    ):
        ShardSet(other.url).verify()
