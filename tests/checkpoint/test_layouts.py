"""Replicated shards (HSDP) are saved once, and read on any layout by every rank that holds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tools import IDENTITY, Part, assembled, index_of, state_of
from tests.engines.tools import BATCH, Trial, fingerprint, fsdp2
from tests.helpers import spawn
from twinflow_train.checkpoint import Checkpoints, Progress
from twinflow_train.dist import World
from twinflow_train.engines.base import Sharded

LAYOUTS = {(1, 0), (2, 0), (2, 1), (4, 2)}
"""Ranks, and how many of them share one copy of the state (0: all)."""

REPLICATED = [(2, 1), (4, 2)]
PAIRS = [(saved, read) for saved in REPLICATED for read in sorted(LAYOUTS)]
Layout = tuple[int, int]


@dataclass(kw_only=True)
class Told:
    """What one rank tells: its state when saved or read, and its bits one step later."""

    there: dict[Layout, Part] = field(default_factory=dict)
    later: dict[Layout, str] = field(default_factory=dict)
    norms: dict[Layout, float] = field(default_factory=dict)


def trial(layout: Layout) -> Trial:
    return Trial.of(2, engine=fsdp2(shard_over=layout[1]))


def opened(
    top: Path, layout: Layout, engine: Sharded, progress: Progress, world: World
) -> Checkpoints:
    return Checkpoints(
        folder=top / f"{layout[0]}-{layout[1]}",
        engine=engine,
        progress=progress,
        world=world,
        identity=IDENTITY,
    )


def save(world: World, top: Path, layout: Layout) -> Told:
    told, engine, progress = Told(), trial(layout).shard(world), Progress()
    trial(layout).learn(engine, 0, world)
    progress.advance(BATCH)
    saves = opened(top, layout, engine, progress, world)
    saves.write()
    told.there[layout] = state_of(engine, progress)
    go_on(told, layout, layout, engine, world)
    saves.finish()
    return told


def read(world: World, top: Path, layout: Layout) -> Told:
    told = Told()
    for saved in REPLICATED:
        engine, progress = trial(layout).shard(world, seed=99), Progress()
        assert opened(top, saved, engine, progress, world).resume(must=True)
        told.there[saved] = state_of(engine, progress)
        go_on(told, saved, layout, engine, world)
    return told


def tell(world: World, top: Path, saves: list[Layout], reads: list[Layout]) -> dict[str, Any]:
    """Save and read runs of some layouts, one after the other."""
    return {
        "saved": {layout: save(world, top, layout) for layout in saves},
        "read": {layout: read(world, top, layout) for layout in reads},
    }


def go_on(told: Told, key: Layout, layout: Layout, engine: Sharded, world: World) -> None:
    _, told.norms[key] = trial(layout).learn(engine, 1, world)
    told.later[key] = fingerprint(engine)


@dataclass(kw_only=True)
class Found:
    """All that the ranks told, by layout."""

    top: Path
    saved: dict[Layout, list[Told]] = field(default_factory=dict)
    read: dict[Layout, list[Told]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    found = Found(top=tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as env:
        env.setenv("TWINFLOW_TYPE_HOOK", "0")  # as in test_saves.py
        for ranks, saves, reads in (
            (2, [(2, 1)], []),
            (4, [(4, 2)], [(4, 2)]),
            (2, [], [(2, 0), (2, 1)]),
            (1, [], [(1, 0)]),
        ):
            told = spawn(tell, ranks, found.top, saves, reads, timeout_seconds=300)
            for layout in saves:
                found.saved[layout] = [each["saved"][layout] for each in told]
            for layout in reads:
                found.read[layout] = [each["read"][layout] for each in told]
    return found


@pytest.mark.parametrize(("saved", "read"), PAIRS)
def test_every_copy_comes_back_exactly(found: Found, saved: Layout, read: Layout) -> None:
    before = assembled([told.there[saved] for told in found.saved[saved]])
    ranks = [told.there[saved] for told in found.read[read]]
    over = read[1] or read[0]
    for first in range(0, len(ranks), over):  # each copy by itself
        after = assembled(ranks[first : first + over])
        assert after.keys() == before.keys()
        assert [key for key in after if not after[key].equal(before[key])] == []
        assert {part.progress for part in ranks} == {(1, BATCH)}


@pytest.mark.parametrize(("saved", "read"), PAIRS)
def test_the_run_goes_on_alike(found: Found, saved: Layout, read: Layout) -> None:
    own = found.saved[saved]
    if saved == read:
        assert [t.later[saved] for t in found.read[read]] == [t.later[saved] for t in own]
    for told in found.read[read]:
        assert told.norms[saved] == pytest.approx(own[0].norms[saved], rel=1e-5)


@pytest.mark.parametrize("saved", REPLICATED)
def test_copies_share_the_work_and_save_nothing_twice(found: Found, saved: Layout) -> None:
    index = index_of(found.top / f"{saved[0]}-{saved[1]}" / "step-00000001")
    assert len(index["files"]) == saved[0]
    begun = Counter(
        (key, offset) for key, e in index["tensors"].items() for _, offset, _ in e["pieces"]
    )
    assert set(begun.values()) == {1}
    sizes = dict.fromkeys(index["files"], 0)
    for entry in index["tensors"].values():
        for file, _, length in entry["pieces"]:
            sizes[file] += length
    assert max(sizes.values()) < 2.5 * min(sizes.values()), sizes
