"""The benchmark of the data measures what it says, on a set that is small."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run it all once, on few small shards."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WIDTH", 64)
        patch.setattr(data, "LATENT", (4, 16, 16))
        patch.setattr(data, "SOURCE", 10**6)
        words = ["--shards=2", "--rounds=2", "--batches=4", "--rate=4", "--many=20"]
        data.main([*words, f"--folder={folder}", f"--out={folder / 'data.json'}"])
    result: dict[str, Any] = json.loads((folder / "data.json").read_text())
    return result


def test_every_way_has_a_figure_from_every_round(found: dict[str, Any]) -> None:
    rounds = found["local"]["rounds"]
    assert {name.split()[0].rstrip(",") for name in rounds} == {"ours", "copying", "webdataset"}
    assert all(len(each) == 2 and min(each) > 0 for each in rounds.values())
    best = max(rounds["ours"]) / max(rounds["copying alone, 1 thread"])
    assert found["local"]["of_one_thread"] == pytest.approx(best, abs=0.001)


def test_bytes_are_those_of_padded_batches(found: dict[str, Any]) -> None:
    least, most = (4 * 16 * 16 * 2 + tokens * 64 * 2 for tokens in (data.TOKENS[0], data.TOKENS[1]))
    assert least < found["local"]["bytes_per_sample"] < most


def test_an_epoch_behind_a_server_is_fetched_about_once(found: dict[str, Any]) -> None:
    assert 1.0 <= found["remote"]["of_epoch_bytes"] < 2.5  # 64 samples are half read ahead
    assert 0.0 < found["remote"]["of_rate"] < 1.1


def test_a_start_in_the_middle_reads_nothing_before_it(found: dict[str, Any]) -> None:
    assert found["resume"]["later_by_at_most"]["disk"] < 1.0
    assert found["resume"]["later_by_at_most"]["server"] < 1.0


def test_the_table_says_what_was_found(found: dict[str, Any]) -> None:
    lines = data.table(found).splitlines()
    assert sum(line.startswith("| ") and "samples/s" not in line for line in lines) == 6
    assert f"{found['local']['times_webdataset']:.1f} times as fast" in lines[-5]
