from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tools import make_sample, make_set
from twinflow_train.batch import Batch
from twinflow_train.data.loader import Shards, prefetch
from twinflow_train.data.order import locate
from twinflow_train.data.shards import ShardSet


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_set(tmp_path_factory.mktemp("data") / "set", 17)


def steps(
    data: Shards, rows: list[list[int]], *, batch: int, start: int, many: int
) -> list[list[Batch]]:
    return list(islice(data.batches(seed=5, batch=batch, rows=rows, start=start), many))


def shown(micros: list[Batch]) -> list[tuple[str, float, bytes]]:
    """List what a rank saw in a step, row by row, without padding."""
    rows = []
    for batch in micros:
        for i, key in enumerate(batch.keys):
            text = batch.cond.tokens[i][batch.cond.full_mask()[i]]
            rows.append((key, float(batch.data[i].mean()), text.numpy().tobytes()))
    return rows


def test_a_batch_holds_the_samples_that_the_order_names(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", 10, samples_per_shard=3)
    data = Shards(path=str(shards.folder), heldout=str(shards.folder), window=2)
    for step, micros in enumerate(steps(data, [[0, 2], [3]], batch=4, start=8, many=4)):
        for batch, rows in zip(micros, [[0, 2], [3]], strict=True):
            assert batch.data.dtype == batch.cond.tokens.dtype == torch.float32
            assert torch.equal(batch.null.tokens, shards.null.tokens)
            for i, row in enumerate(rows):
                position = 8 + 4 * step + row
                _, index = locate(position, seed=5, counts=shards.counts, window=2)
                sample = make_sample(index)
                text = batch.cond.tokens[i][batch.cond.full_mask()[i]]
                assert batch.keys[i] == sample.key
                assert torch.equal(batch.data[i], sample.latent)
                assert any(torch.equal(text, wrote.float()) for wrote in sample.texts)


@settings(deadline=None, max_examples=25)
@given(
    dealt=st.permutations(range(12)), ranks=st.sampled_from([1, 2, 3, 4, 6]), step=st.integers(0, 5)
)
def test_the_global_batch_does_not_depend_on_the_deal(
    shards: ShardSet, dealt: list[int], ranks: int, step: int
) -> None:
    data = Shards(path=str(shards.folder), window=2)
    start = 12 * step
    whole = shown(steps(data, [list(range(12))], batch=12, start=start, many=1)[0])
    union = []
    for rank in range(ranks):
        mine = dealt[rank::ranks]
        micro_batches = [mine[:1], mine[1:]]
        seen = shown(steps(data, micro_batches, batch=12, start=start, many=1)[0])
        union += list(zip(mine, seen, strict=True))
    assert [sample for _, sample in sorted(union)] == whole


def test_a_resumed_stream_continues_the_first_one(shards: ShardSet) -> None:
    data = Shards(path=str(shards.folder), window=2)
    rows = [[0, 1], [2, 3]]
    through = steps(data, rows, batch=4, start=0, many=9)
    resumed = steps(data, rows, batch=4, start=20, many=4)
    assert [shown(step) for step in resumed] == [shown(step) for step in through[5:]]


def test_an_epoch_is_seen_once_and_captions_change_between_epochs(shards: ShardSet) -> None:
    data = Shards(path=str(shards.folder))
    seen = [
        row for step in steps(data, [[0]], batch=1, start=0, many=17 * 8) for row in shown(step)
    ]
    texts: dict[str, set[bytes]] = {}
    for epoch in range(8):
        rows = seen[17 * epoch : 17 * (epoch + 1)]
        assert len({key for key, _, _ in rows}) == 17
        for key, _, text in rows:
            texts.setdefault(key, set()).add(text)
    assert sum(len(kinds) == 2 for kinds in texts.values()) >= 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"data\.window is 0"),
        ({"window": 257}, r"data\.window is 257"),
        ({"prefetch": -1}, r"data\.prefetch is -1"),
    ],
)
def test_bad_values_name_the_key_and_the_number(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shards(**options)  # type: ignore[arg-type]


def test_a_missing_folder_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"data\.path"):
        Shards(path="nowhere").train()
    with pytest.raises(ValueError, match=r"data\.heldout"):
        Shards(heldout="nowhere").held_out()


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_prefetching_changes_nothing(depth: int) -> None:
    assert list(prefetch(iter(range(20)), depth)) == list(range(20))
    assert threads() == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_arrives_after_the_items_before_it(depth: int) -> None:
    def broken() -> Iterator[int]:
        yield from (1, 2, 3)
        raise RuntimeError("disk on fire")

    seen = []
    with pytest.raises(RuntimeError, match="disk on fire"):  # noqa: PT012
        for item in prefetch(broken(), depth):
            seen.append(item)  # noqa: PERF402
    assert seen == [1, 2, 3]
    assert threads() == 0


def test_at_most_depth_items_wait() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with closing(prefetch(items(), 3)) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three waiting, one in the thread's hand


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_stops_the_thread(taken: int) -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 0

    ahead = prefetch(forever(), 2)
    for _ in range(taken):
        next(ahead)
    assert threads() == (taken > 0)
    ahead.close()
    assert threads() == 0
