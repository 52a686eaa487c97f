"""The plan: every item once, shards of one size, the same for whoever makes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow_train.encoding.images import NoImages, Stored
from twinflow_train.encoding.pictures import Size, Unusable
from twinflow_train.encoding.plan import LEFT_OUT, PLAN, Plan, ahead, make_plan, read_lines
from twinflow_train.encoding.sources import Content, Reader, Where
from twinflow_train.encoding.splitting import everything
from twinflow_train.errors import UserError


@dataclass
class Listed(Reader):
    """Pictures of known sizes; a height of 0 stands for one that is damaged."""

    sizes: Sequence[tuple[int, int]]

    def find(self) -> Iterator[Where]:
        yield from (("list", number) for number in range(len(self.sizes)))

    def measure(self, where: Where) -> Size:
        size = self.sizes[int(where[1])]
        time.sleep(0.0001 * (size[1] % 3))  # threads end in another order than they began
        if not size[0]:
            raise Unusable("damaged")
        return Size(*size)

    def read(self, where: Where) -> Content:
        raise AssertionError("planning reads headers alone")


def planned(folder: Path, reader: Reader, *, per_shard: int = 3, loaders: int = 3) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    make_plan(
        folder, reader, Stored(side=64, ratios=[1.0, 1.5]),
        wanted=everything, agree=lambda: None, multiple=16, samples_per_shard=per_shard,
        loaders=loaders, show=False,
    )  # fmt: skip
    return Plan.read(folder)


PICTURES = st.lists(
    st.sampled_from([(64, 64), (70, 64), (96, 64), (64, 96), (20, 20), (0, 1), (0, 2)]),
    min_size=1,
    max_size=40,
).filter(lambda sizes: any(size[0] > 60 for size in sizes))


@settings(deadline=None, max_examples=25)
@given(sizes=PICTURES, per_shard=st.integers(1, 5))
def test_each_item_is_in_one_shard_of_its_size_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    plan = planned(folder, Listed(sizes), per_shard=per_shard)
    tasks = [plan.task(number) for number in range(len(plan))]
    left_out = read_lines(folder / LEFT_OUT)
    numbers = [item.number for task in tasks for item in task.items]
    assert sorted([*numbers, *(each.number for each in left_out)]) == list(range(len(sizes)))
    assert {each.number for each in left_out} == {
        number for number, size in enumerate(sizes) if size[0] < 60
    }
    short: set[Size] = set()
    for task in tasks:
        assert len(task.items) <= per_shard
        assert [item.number for item in task.items] == sorted(item.number for item in task.items)
        if len(task.items) < per_shard:
            assert task.size not in short  # at most one shard of a size is not full
            short.add(task.size)
        for item in task.items:
            height, width = sizes[item.number]
            lies = (task.size.height > task.size.width) - (task.size.height < task.size.width)
            assert lies == (
                0 if (height, width) == (70, 64) else (height > width) - (height < width)
            )
            assert item.where == ("list", item.number)


def test_the_plan_does_not_depend_on_who_makes_it(tmp_path: Path) -> None:
    sizes = [[(64, 64), (64, 96), (0, 1), (96, 64)][n * n % 4] for n in range(50)]
    for name, loaders in (("one", 1), ("two", 8)):
        planned(tmp_path / name, Listed(sizes), loaders=loaders)
    for file in (PLAN, LEFT_OUT):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_why_an_item_is_left_out_is_kept(tmp_path: Path) -> None:
    planned(tmp_path, Listed([(64, 64), (0, 1), (10, 10)]))
    said = {each.name: each.reason for each in read_lines(tmp_path / LEFT_OUT)}
    assert said.keys() == {"list:1", "list:2"}
    assert said["list:1"] == "damaged"
    assert said["list:2"].startswith("10x10 is too small")


def test_nothing_to_prepare_is_an_error_and_no_plan(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing to prepare .*: 2 items .* list:0 because damaged"
    ):
        planned(tmp_path, Listed([(0, 1), (0, 1)]))
    with pytest.raises(UserError, match=r"nothing to prepare .*: 0 items were found"):
        planned(tmp_path, Listed([]))
    assert list(tmp_path.iterdir()) == []


def test_chosen_sizes_are_taken_in_turn_and_have_to_fit(tmp_path: Path) -> None:
    images = NoImages(sizes=[[64, 64], [32, 96], [64, 64]])
    make_plan(
        tmp_path, Listed([(0, 0)] * 7), images,
        wanted=everything, agree=lambda: None, multiple=16, samples_per_shard=9, loaders=2,
        show=False,
    )  # fmt: skip
    plan = Plan.read(tmp_path)
    tasks = [plan.task(number) for number in range(len(plan))]
    assert {task.size: [item.number for item in task.items] for task in tasks} == {
        Size(32, 96): [1, 4], Size(64, 64): [0, 2, 3, 5, 6]
    }  # fmt: skip
    with pytest.raises(UserError, match=r"images\.sizes: 64x40 is not a multiple of 16 .* 64x32"):
        NoImages(sizes=[[64, 40]]).sizes_for(16)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Stored, {"side": 0}, r"images\.side is 0; it must be at least 1"),
        (Stored, {"ratios": []}, r"images\.ratios is \[\]"),
        (
            Stored,
            {"ratios": [0.5]},
            r"images\.ratios is \[0\.5\]; it must be a list of numbers from",
        ),
        (Stored, {"upscale": 0.0}, r"images\.upscale is 0\.0; it must be positive"),
        (NoImages, {"sizes": []}, r"images\.sizes is \[\]"),
        (
            NoImages,
            {"sizes": [[64]]},
            r"images\.sizes is \[\[64\]\]; it must be a list of \[height",
        ),
        (NoImages, {"sizes": [[64, 0]]}, r"images\.sizes is \[\[64, 0\]\]"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_by_key(
    kind: type, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kind(**options)


def test_threads_work_ahead_but_not_far_and_results_keep_their_order() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def slowly(number: int) -> int:
        with lock:
            begun.append(number)
        time.sleep(0.002 * (number % 3))
        return -number

    with ThreadPoolExecutor(4) as pool:
        found = ahead(pool, slowly, range(40), 5)
        assert next(found) == (0, 0)
        time.sleep(0.05)
        assert max(begun) <= 6
        assert list(found) == [(number, -number) for number in range(1, 40)]
