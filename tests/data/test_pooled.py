"""Pooled embeddings on their way from a sample to whoever asks a network."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.data.tools import ABOUT, make_sample
from twinflow_train.batch import Condition, Embedding
from twinflow_train.data.loader import Shards
from twinflow_train.data.manifest import NULL
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_null, write_shards
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evals.health import Health
from twinflow_train.evals.heldout import heldout_loss

WIDTH = 5
WORLD = World(rank=0, size=1, device=torch.device("cpu"))
NOTHING = Embedding(torch.ones(3, 6).bfloat16(), torch.full((WIDTH,), -1.0).bfloat16())


def pooled(sample: int, caption: int) -> Tensor:
    """A caption's pooled embedding says whose it is."""
    return torch.full((WIDTH,), float(2 * sample + caption)).bfloat16()


def write(folder: Path, *, null: Embedding = NOTHING) -> ShardSet:
    samples = (replace(make_sample(n), pooled=[pooled(n, 0), pooled(n, 1)]) for n in range(8))
    return write_shards(folder, samples, null=null, about=ABOUT, samples_per_shard=3)


def mean_of_tokens(cond: Condition, row: int) -> float:
    return float(cond.tokens[row][cond.full_mask()[row]].float().mean())


def test_in_training_every_row_has_the_pooled_embedding_of_its_caption(tmp_path: Path) -> None:
    shards = write(tmp_path / "set")
    assert shards.manifest.form.pooled_width == WIDTH
    data = Shards(path=str(shards.folder), window=2, prefetch=0)
    stream = data.stream(seed=5, batch=4)
    rows = [[0, 2], [1, 3]]
    with closing(data.batches(stream, rows=rows, groups=[4], step=0)) as found:
        for step, micros in enumerate(islice(found, 4)):
            for batch, mine in zip(micros, rows, strict=True):
                assert batch.cond.pooled is not None
                assert batch.null.pooled is not None
                assert torch.equal(batch.null.pooled[0], pooled(0, 0) - 1)
                for i, ref in enumerate(stream.rows(stream.plan(step, mine, groups=[4]))):
                    expected = pooled(ref.number, ref.caption % 2)
                    assert torch.equal(batch.cond.pooled[i], expected)


def test_evaluations_give_a_network_the_pooled_embedding_of_the_row(tmp_path: Path) -> None:
    shards = write(tmp_path / "set")
    whose = {
        round(float(make_sample(n).texts[0].float().mean()), 5): pooled(n, 0) for n in range(8)
    }
    seen = set()

    def velocity(x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, /) -> Tensor:
        assert cond.pooled is not None
        assert cond.pooled.dtype == torch.float32
        for i in range(len(cond)):
            mean = round(mean_of_tokens(cond, i), 5)
            assert torch.equal(cond.pooled[i], whose[mean].float())
            seen.add(mean)
        return x_t

    heldout_loss(velocity, shards, WORLD, samples=16, batch=5, seed=0)
    assert seen == whose.keys()
    seen.clear()
    health = Health(student=velocity, teacher=velocity, delta=0.01, order=1, dtype=torch.float32)
    health.measure(shards, WORLD)
    assert seen == whose.keys()


def test_a_null_prompt_that_is_embedded_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"null prompt.*\(6, 0\).*\(6, 5\)"):
        write(tmp_path / "set", null=Embedding(NOTHING.tokens))
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match=r"null prompt.*\(6, 7\).*\(6, 5\)"):
        write(tmp_path / "set", null=replace(NOTHING, pooled=torch.ones(7)))


def test_a_stored_null_prompt_that_lacks_its_pooled_embedding_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set").folder
    manifest = (folder / "manifest.json").read_text()
    whole = ShardSet(folder).manifest.null_sha256
    (folder / "manifest.json").write_text(
        manifest.replace(whole, write_null(folder, NOTHING.tokens))
    )
    assert safetensors.torch.load_file(folder / NULL).keys() == {"text.0"}
    with pytest.raises(UserError, match=r"not a null prompt \(KeyError\('pooled\.0'\)\)"):
        ShardSet(folder).null  # noqa: B018 - read when it is asked for
