"""The whole program on data behind a URL: the server's log says which samples were shown."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.server import Request, Server, serve
from tests.tiny import Tiny, lines, steps, tiny
from twinflow_train.data.loader import Shards
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards

BATCH, STEPS, SAVED = 8, 20, 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture
def server(run: Tiny) -> Iterator[Server]:
    with serve(run.folder) as found:
        yield found


@pytest.fixture(scope="module")
def wide(run: Tiny) -> ShardSet:
    """A second set, beside the first: images of another shape, and no whole number of batches."""
    train = ShardSet(run.folder / "train")
    samples = (train.read(index) for index in range(36))
    return write_shards(
        run.folder / "wide",
        (replace(s, key=f"wide-{n}", latent=s.image[..., :14]) for n, s in enumerate(samples)),
        null=train.null.tokens[0],
        about=train.manifest.about,
        samples_per_shard=10,
    )


def words(run: Tiny, folder: Path, path: str, *more: str) -> list[str]:
    """Return the command line of a run that reads each step when it comes to it."""
    return run.words(
        folder,
        f"data.path={path}",
        *("data.prefetch=0", "data.window=2", "data.lanes=4", "data.by_length=true"),
        *("micro_batch=2", f"steps={STEPS}", f"save_every={SAVED}", "eval_every=0"),
        *more,
    )


def keys_of(requests: list[Request], *sets: ShardSet) -> list[list[str]]:
    """Return the keys of each step's samples: no rank reads on before all have what it needs."""
    keys = {
        (f"{one.place.name}/{shard.file}", entry.tensors_at): entry.key
        for one in sets
        for number, shard in enumerate(one.manifest.shards)
        for entry in one.index(number)
    }
    found = [keys[request.file, request.begin] for request in requests]
    return [sorted(found[k : k + BATCH]) for k in range(0, len(found), BATCH)]


def kill_and_continue(
    run: Tiny, server: Server, folder: Path, *told: str, steps_in_all: int
) -> list[Request]:
    """Kill two ranks between two saves and go on with four; return what made the run's steps."""
    with run.program.group(2, *told) as ranks:
        deadline = time.monotonic() + 180
        saved = folder / "checkpoints" / f"step-{SAVED:08d}" / "COMPLETE"
        while not (saved.exists() and f'"step": {SAVED + 1}' in _read(folder / "metrics.jsonl")):
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
    assert steps(folder) == list(range(steps_in_all))
    after = server.asked(".tar")
    assert len(after) == (steps_in_all - SAVED) * BATCH
    return before[: SAVED * BATCH] + after


def test_a_killed_run_of_two_ranks_goes_on_with_four_where_it_was(
    run: Tiny, server: Server, tmp_path: Path
) -> None:
    """Killed between two saves: up to the first, and from there on, each sample is shown once."""
    url = f"{server.url}/train"
    told = words(run, tmp_path / "run", url)
    requests = kill_and_continue(run, server, tmp_path / "run", *told, steps_in_all=STEPS)
    assert len(server.asked("manifest.json")) == 4  # each rank reads it once
    shards = ShardSet(run.folder / "train")
    found = keys_of(requests, shards)
    stream = Shards(path=url, window=2, lanes=4, by_length=True, prefetch=0).stream(
        seed=0, batch=BATCH
    )
    for step in range(STEPS):
        refs = stream.rows(stream.plan(step, range(BATCH), groups=[BATCH]))
        shown = [shards.index(ref.shard)[ref.place].key for ref in refs]
        assert found[step] == sorted(shown)
    whole = len(shards) // BATCH
    assert len({key for step in found[:whole] for key in step}) == whole * BATCH


def test_a_mixture_that_was_killed_shows_each_sample_once_in_each_epoch_of_its_set(
    run: Tiny, server: Server, wide: ShardSet, tmp_path: Path
) -> None:
    """Two sets of different shapes: the second is shown whole twice as often as the first."""
    many, train = 30, ShardSet(run.folder / "train")
    mix = f"data.mix=[{{path: {server.url}/wide, weight: 2.0}}]"
    told = words(run, tmp_path / "run", f"{server.url}/train", mix, f"steps={many}")
    requests = kill_and_continue(run, server, tmp_path / "run", *told, steps_in_all=many)
    epochs = []
    found = keys_of(requests, train, wide)
    for prefix, one in (("digit", train), ("wide", wide)):
        mine = [keys for keys in found if keys[0].startswith(prefix)]
        assert all(key.startswith(prefix) for keys in mine for key in keys)
        counts = dict.fromkeys((e.key for n in range(len(one.counts)) for e in one.index(n)), 0)
        for number, keys in enumerate(mine, 1):
            for key in keys:
                counts[key] += 1
            epoch, rest = divmod(number * BATCH, len(one))
            shown_again = sum(count == epoch + 1 for count in counts.values())
            assert (shown_again, set(counts.values()) <= {epoch, epoch + 1}) == (rest, True)
        epochs.append(sum(counts.values()) / len(one))
    assert epochs[0] > 1
    assert epochs[1] / epochs[0] == pytest.approx(2, rel=0.2)


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
