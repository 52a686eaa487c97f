from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tools import make_sample, make_set
from twinflow_train.batch import Batch
from twinflow_train.data.loader import Part, Shards, prefetch
from twinflow_train.data.shards import ShardSet


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_set(tmp_path_factory.mktemp("data") / "set", 17)


def steps(
    data: Shards, rows: list[list[int]], *, batch: int, step: int = 0, many: int
) -> list[list[Batch]]:
    stream = data.stream(seed=5, batch=batch)
    with closing(data.batches(stream, rows=rows, groups=[batch], step=step)) as found:
        return list(islice(found, many))


def shown(micros: list[Batch]) -> list[tuple[str, float, bytes]]:
    """List what a rank saw in a step, row by row, without padding."""
    rows = []
    for batch in micros:
        for i, key in enumerate(batch.keys):
            text = batch.cond.tokens[i][batch.cond.full_mask()[i]]
            rows.append((key, float(batch.data[i].mean()), text.float().numpy().tobytes()))
    return rows


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("by_length", [False, True])
def test_a_batch_holds_the_samples_that_the_stream_names(
    tmp_path: Path, prefetch: int, by_length: bool
) -> None:
    shards = make_set(tmp_path / "set", 10, samples_per_shard=3)
    data = Shards(
        path=str(shards.folder), window=2, prefetch=prefetch, by_length=by_length, lanes=2
    )
    stream = data.stream(seed=5, batch=4)
    for step, micros in enumerate(steps(data, [[0, 2], [3]], batch=4, step=2, many=4), 2):
        for batch, rows in zip(micros, [[0, 2], [3]], strict=True):
            assert batch.data.dtype == torch.float32
            assert batch.cond.tokens.dtype == torch.bfloat16
            assert torch.equal(batch.null.tokens, shards.null.tokens)
            assert batch.skipped == 0
            for i, ref in enumerate(stream.rows(stream.plan(step, rows, groups=[4]))):
                sample = make_sample(ref.number)
                text = batch.cond.tokens[i][batch.cond.full_mask()[i]]
                assert batch.keys[i] == sample.key
                assert torch.equal(batch.data[i], sample.image)
                assert torch.equal(text, sample.texts[ref.caption % 2])
                assert not batch.cond.tokens[i][~batch.cond.full_mask()[i]].any()


@settings(deadline=None, max_examples=25)
@given(
    dealt=st.permutations(range(12)), ranks=st.sampled_from([1, 2, 3, 4, 6]), step=st.integers(0, 5)
)
def test_the_global_batch_does_not_depend_on_the_deal(
    shards: ShardSet, dealt: list[int], ranks: int, step: int
) -> None:
    data = Shards(path=str(shards.folder), window=2)
    whole = shown(steps(data, [list(range(12))], batch=12, step=step, many=1)[0])
    union = []
    for rank in range(ranks):
        mine = dealt[rank::ranks]
        micro_batches = [mine[:1], mine[1:]]
        seen = shown(steps(data, micro_batches, batch=12, step=step, many=1)[0])
        union += list(zip(mine, seen, strict=True))
    assert [sample for _, sample in sorted(union)] == whole


def test_a_resumed_stream_continues_the_first_one(shards: ShardSet) -> None:
    data = Shards(path=str(shards.folder), window=2)
    rows = [[0, 1], [2, 3]]
    through = steps(data, rows, batch=4, many=9)
    resumed = steps(data, rows, batch=4, step=5, many=4)
    assert [shown(step) for step in resumed] == [shown(step) for step in through[5:]]


def test_an_epoch_is_seen_once_and_captions_change_between_epochs(shards: ShardSet) -> None:
    data = Shards(path=str(shards.folder))
    seen = [row for step in steps(data, [[0]], batch=1, many=17 * 8) for row in shown(step)]
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
        ({"threads": 0}, r"data\.threads is 0"),
        ({"lanes": 6}, r"data\.lanes is 6; it must be a power of two"),
        ({"skip_budget": -1}, r"data\.skip_budget is -1"),
        ({"attempts": 0}, r"data\.attempts is 0"),
        ({"weight": 0.0}, r"data\.weight is 0"),
        ({"cache_gb": 0.0}, r"data\.cache_gb is 0"),
    ],
)
def test_bad_values_name_the_key_and_the_number(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shards(**options)


def test_a_bad_part_of_a_mixture_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"data\.mix\.weight is 0"):
        Part(weight=0.0)


def test_a_missing_folder_names_its_key(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"data\.path"):
        Shards(path="nowhere").train()
    with pytest.raises(ValueError, match=r"data\.heldout"):
        Shards(heldout="nowhere").held_out()
    with pytest.raises(ValueError, match=r"data\.mix: .*nowhere"):
        Shards(path=str(shards.folder), mix=[Part(path="nowhere")]).train()


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
