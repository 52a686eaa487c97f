"""The whole program on data behind a URL: the server's log says which samples were shown."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.server import Request, Server, serve
from tests.tiny import Tiny, lines, steps, tiny
from twinflow_train.data.loader import Shards
from twinflow_train.data.shards import ShardSet

BATCH, STEPS, SAVED = 8, 20, 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture
def server(run: Tiny) -> Iterator[Server]:
    with serve(run.folder / "train") as found:
        yield found


def words(run: Tiny, folder: Path, path: str, *more: str) -> list[str]:
    """Return the command line of a run that reads each step when it comes to it."""
    return run.words(
        folder,
        f"data.path={path}",
        *("data.prefetch=0", "data.window=2", "data.lanes=4", "data.by_length=true"),
        *("micro_batch=2", f"steps={STEPS}", f"save_every={SAVED}", "eval_every=0"),
        *more,
    )


def keys_of(requests: list[Request], shards: ShardSet) -> list[list[str]]:
    """Return the keys of each step's samples: no rank reads on before all have what it needs."""
    files = [shard.file for shard in shards.manifest.shards]
    keys = {
        (file, entry.tensors_at): entry.key
        for number, file in enumerate(files)
        for entry in shards.index(number)
    }
    found = [keys[request.file, request.begin] for request in requests]
    return [sorted(found[k : k + BATCH]) for k in range(0, len(found), BATCH)]


def test_a_killed_run_of_two_ranks_goes_on_with_four_where_it_was(
    run: Tiny, server: Server, tmp_path: Path
) -> None:
    """Killed between two saves: up to the first, and from there on, each sample is shown once."""
    told = words(run, tmp_path / "run", server.url)
    with run.program.group(2, *told) as ranks:
        deadline = time.monotonic() + 180
        while f'"step": {SAVED + 3}' not in _read(tmp_path / "run" / "metrics.jsonl"):
            assert all(rank.alive for rank in ranks), ranks[0].wait().err
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for rank in ranks:
            rank.send(signal.SIGKILL)
        assert {rank.wait().code for rank in ranks} <= {-signal.SIGKILL, 1}
    before = server.asked(".tar")
    server.requests = []
    ended = run.program.run_group(4, *told)
    assert [one.code for one in ended] == [0] * 4, ended[0].err
    assert steps(tmp_path / "run") == list(range(STEPS))

    after = server.asked(".tar")
    assert len(after) == (STEPS - SAVED) * BATCH
    shards = ShardSet(run.folder / "train")
    found = keys_of(before[: SAVED * BATCH] + after, shards)
    stream = Shards(path=server.url, window=2, lanes=4, by_length=True, prefetch=0).stream(
        seed=0, batch=BATCH
    )
    for step in range(STEPS):
        refs = stream.rows(stream.plan(step, range(BATCH), groups=[BATCH]))
        shown = [shards.index(ref.shard)[ref.place].key for ref in refs]
        assert found[step] == sorted(shown)
    whole = len(shards) // BATCH
    assert len({key for step in found[:whole] for key in step}) == whole * BATCH


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture
def broken(run: Tiny, tmp_path: Path) -> Path:
    """A set whose second sample has a latent, the first of its tensors, that is not finite."""
    folder = Path(shutil.copytree(run.folder / "train", tmp_path / "broken"))
    (_, second, *_) = json.loads((folder / "000000.index.json").read_text())
    with (folder / "000000.tar").open("r+b") as file:
        file.seek(second[1])
        header = int.from_bytes(file.read(8), "little")
        file.seek(second[1] + 8 + header)
        file.write(b"\xff" * 8)
    return folder


def test_a_sample_that_cannot_be_used_ends_all_ranks_with_its_name(
    run: Tiny, broken: Path, tmp_path: Path
) -> None:
    ended = run.program.run_group(2, *words(run, tmp_path / "run", str(broken)))
    assert [one.code for one in ended] == [2, 2]
    said = [line for one in ended for line in one.errors]
    named = (
        rf"error: .*{broken}/000000\.tar: sample digit-0050 cannot be read: `latent` is not finite"
    )
    assert re.match(named, said[0])


def test_a_sample_that_is_skipped_is_counted(run: Tiny, broken: Path, tmp_path: Path) -> None:
    told = words(run, tmp_path / "run", str(broken), "data.on_error=skip")
    ended = run.program.run_group(2, *told)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    counts = [line["data/skipped"] for line in lines(tmp_path / "run") if "loss/total" in line]
    assert counts[0] == 0
    assert counts[-1] >= 1
    assert counts == sorted(counts)
