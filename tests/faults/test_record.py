"""What a run remembers of its faults, and what counts as unusual."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import median

import pytest

from twinflow_train.faults.record import ENOUGH, WINDOW, Record
from twinflow_train.faults.settings import Faults


def usual(steps: int) -> Record:
    """Remember steps whose losses lie around 2 and norms around 1."""
    record = Record()
    for n in range(steps):
        record.updated(n, 2 + (n % 5 - 2) / 10, 1 + (n % 3 - 1) / 10)
    return record


def test_nothing_is_unusual_before_enough_is_known() -> None:
    assert usual(ENOUGH - 1).limits(3) == (math.inf, math.inf)
    assert max(usual(ENOUGH).limits(3)) < math.inf
    assert usual(ENOUGH).limits(0) == (math.inf, math.inf)


def test_the_limit_is_so_many_median_deviations_above_the_median() -> None:
    record = usual(WINDOW)
    for values, limit in zip((record.losses, record.norms), record.limits(7), strict=True):
        middle = median(values)
        deviation = sorted(abs(v - middle) for v in values)
        half = (deviation[WINDOW // 2 - 1] + deviation[WINDOW // 2]) / 2
        assert limit == pytest.approx(middle + 7 * max(half, middle / 100))


def test_outliers_hardly_move_the_limit() -> None:
    record = usual(WINDOW)
    before = record.limits(10)
    for _ in range(WINDOW // 8):
        record.updated(WINDOW, 1e6, 1e6)
    assert record.limits(10) == pytest.approx(before, rel=1.5)


def test_a_run_without_any_spread_has_a_limit_above_its_median() -> None:
    record = Record()
    for _ in range(ENOUGH):
        record.updated(0, 3.0, 3.0)
    assert record.limits(10) == pytest.approx((3.3, 3.3))


def test_only_the_last_steps_count() -> None:
    record = Record()
    for n in range(3 * WINDOW):
        record.updated(n, n, n)
    assert record.losses == list(map(float, range(2 * WINDOW - 1, 3 * WINDOW)))


def test_skipped_steps_are_counted_until_one_is_taken() -> None:
    record = usual(4)
    record.was_skipped()
    record.was_skipped()
    assert (record.skipped, record.in_row, len(record.norms)) == (2, 2, 4)
    record.updated(4, 1.0, 1.0)
    assert (record.skipped, record.in_row, len(record.norms)) == (2, 0, 5)


def test_a_run_that_went_back_knows_what_it_has_seen() -> None:
    record = usual(4)
    ahead = replace(record, skipped=5, in_row=3, rollbacks=1, norms=[9.0])
    record.went_back(ahead, passed=17)
    assert (record.passed, record.skipped, record.in_row, record.rollbacks) == (17, 5, 0, 2)
    assert record.norms == usual(4).norms


def test_it_comes_back_from_json_in_every_bit() -> None:
    record = usual(50)
    record.losses = [value / 3 for value in record.losses]
    record.passed, record.rollbacks = 4, 1
    record.was_skipped()
    assert Record.of(json.loads(json.dumps(vars(record)))) == record


def test_what_an_older_program_did_not_write_is_as_at_the_start() -> None:
    assert Record.of({}) == Record()


@pytest.mark.parametrize("stored", [3, None, {"norms": 3}, {"skipped": "many"}])
def test_what_is_none_is_told(stored: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Record.of(stored)


@pytest.mark.parametrize("key", ["budget", "rollbacks", "report_above", "skip_above"])
def test_negative_settings_are_refused_by_key(key: str) -> None:
    with pytest.raises(ValueError, match=rf"faults\.{key} is -1; it must be 0 or more"):
        Faults(**{key: -1})
