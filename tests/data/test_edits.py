"""Sets for editing: reference images, and a null prompt that goes with them, for each sample."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.tools import ABOUT, make_sample, make_set
from twinflow_train.data.loader import OnError, Shards
from twinflow_train.data.manifest import Form
from twinflow_train.data.sample import Sample, condition_of
from twinflow_train.data.shards import DataError, ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError

ROWS = [[0, 2, 3], [1, 4, 5]]


def null(number: int) -> Tensor:
    """A sample's null prompt says whose it is, by its numbers and by its length."""
    return torch.full((2 + number % 4, 6), -float(number + 1)).bfloat16()


def edit(number: int, references: int = 2) -> Sample:
    """Make a sample whose references are its number, and the number and a half."""
    latent = (torch.full((1, 4, 4), number + n / 2) for n in range(references))
    return replace(make_sample(number), references=tuple(latent), null=null(number))


def write(folder: Path, samples: int = 12) -> ShardSet:
    return write_shards(
        folder, map(edit, range(samples)), null=torch.ones(3, 6), about=ABOUT, samples_per_shard=4
    )


def test_references_and_null_prompts_read_back_exactly(tmp_path: Path) -> None:
    shards = write(tmp_path / "set")
    shards.verify()
    assert shards.manifest.form == Form(
        latent_dtype="float32", text_width=6, text_dtype="bfloat16", references=2, own_null=True
    )
    for number in range(12):
        found = shards.read(number, caption=number)
        assert found.null is not None
        assert torch.equal(found.null, null(number))
        assert [float(one.mean()) for one in found.references] == [number, number + 0.5]
    cond = condition_of([shards.read(number) for number in (3, 5)])
    assert [float(one[1].mean()) for one in cond.references] == [5, 5.5]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_in_training_every_row_has_its_own_references_and_null_prompt(
    tmp_path: Path, prefetch: int
) -> None:
    data = Shards(path=str(write(tmp_path / "set").folder), window=2, prefetch=prefetch)
    stream = data.stream(seed=5, batch=6)
    masked = 0
    with closing(data.batches(stream, rows=ROWS, groups=[6], step=0)) as found:
        for micros in islice(found, 6):
            for batch in micros:
                assert len(batch.null) == len(batch.data) == 3
                masked += batch.null.mask is not None
                for i, number in enumerate(batch.data.flatten(1).mean(1).tolist()):
                    own = batch.null.tokens[i][batch.null.full_mask()[i]]
                    assert torch.equal(own, null(int(number)))
                    for cond in (batch.cond, batch.null):
                        shown = [float(one[i].mean()) for one in cond.references]
                        assert shown == [number, number + 0.5]
    assert masked


def test_a_sample_shown_instead_of_another_brings_its_own(tmp_path: Path) -> None:
    shards = write(tmp_path / "set")
    for shard in shards.manifest.shards[1:]:
        (shards.folder / shard.file).write_bytes(b"0" * shard.bytes)
    data = Shards(
        path=str(shards.folder), window=3, prefetch=0, on_error=OnError["skip"], by_length=False
    )
    stream, skipped = data.stream(seed=5, batch=6), 0
    with closing(data.batches(stream, rows=ROWS, groups=[6], step=0)) as found:
        for micros in islice(found, 2):
            for batch in micros:
                skipped += batch.skipped
                for i, number in enumerate(batch.data.flatten(1).mean(1).tolist()):
                    own = batch.null.tokens[i][batch.null.full_mask()[i]]
                    assert torch.equal(own, null(int(number)))
                    assert float(batch.null.references[0][i].mean()) == number
    assert skipped


def test_references_without_own_null_prompts_stand_beside_the_one_that_all_share(
    tmp_path: Path,
) -> None:
    samples = (replace(edit(number), null=None) for number in range(6))
    shards = write_shards(tmp_path / "set", samples, null=torch.ones(3, 6), about=ABOUT)
    data = Shards(path=str(shards.folder), prefetch=0)
    stream = data.stream(seed=5, batch=6)
    with closing(data.batches(stream, rows=ROWS, groups=[6], step=0)) as found:
        batch = next(found)[0]
    assert torch.equal(batch.null.tokens, torch.ones(3, 3, 6))
    assert batch.null.references == batch.cond.references


def test_sets_without_own_null_prompts_are_written_as_before(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set").folder
    assert "own_null" not in json.loads((folder / "manifest.json").read_text())["form"]
    assert {len(row) for row in json.loads((folder / "000000.index.json").read_text())} == {6}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"null": None}, "s001: is .*own_null=False.*, the others are .*own_null=True"),
        ({"null": torch.ones(3, 6)}, r"null\.0` is float32 \(3, 6\), where bfloat16 \(tokens, 6\)"),
        ({"null": torch.ones(0, 6).bfloat16()}, r"null\.0` is bfloat16 \(0, 6\)"),
        ({"null": torch.full((1, 6), float("nan")).bfloat16()}, r"`null\.0` is not finite"),
        ({"references": ()}, "references=0, .*the others are .*references=2"),
        ({"references": (torch.ones(1, 4, 4),) * 3}, "references=3, .*are .*references=2"),
        ({"references": (torch.ones(1, 4, 5),) * 2}, r"reference\.0.*\(1, 4, 5\).*\(1, 4, 4\)"),
    ],
)
def test_a_sample_that_is_not_like_the_others_is_never_written(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    samples = [edit(0), replace(edit(1), **change)]
    with pytest.raises(UserError, match=match):
        write_shards(tmp_path / "set", samples, null=torch.ones(3, 6), about=ABOUT)


def test_a_null_prompt_that_is_not_as_long_as_the_index_says_is_named(tmp_path: Path) -> None:
    shards = write(tmp_path / "set", 3)
    entry = shards.index(0)[1]
    assert entry.null == len(null(1))
    with pytest.raises(DataError, match=r"sample s001 .* 3 tokens, the index says 5"):
        shards.copy(
            0, entry._replace(null=5), lambda name, size: memoryview(bytearray(size)), caption=0
        )
