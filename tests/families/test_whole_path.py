"""Each family from pictures to a picture, by the real programs on a tiny pipeline.

Pictures and captions are prepared; two ranks train three steps by FSDP2, go on for three by ZeRO-3
and for one by FSDP2 again, each from the checkpoint before; the export is drawn with by the stock
pipeline, and by ours. The families stand in `rows.py`, which also says how to add one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.encoding.tools import picture as picture_of
from tests.families.rows import PROMPT, ROWS, SIDE
from tests.program import Program, refused, serve
from twinflow_train.data.shards import ShardSet
from twinflow_train.export import export
from twinflow_train.sampling import TwinFlowPipeline

LEGS = {"fsdp2": 3, "zero3": 6, "fsdp2_gathered": 7}
"""Up to which step each engine goes."""
KEYS = {"loss/total", "norm/grad"}


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Program:
    scratch = tmp_path_factory.mktemp("prepare")
    return serve(scratch=scratch, cwd=scratch, server="tests.families.server")


@pytest.fixture(scope="module")
def train(prepare: Program, tmp_path_factory: pytest.TempPathFactory) -> Program:
    scratch = tmp_path_factory.mktemp("train")  # its server starts while the other one does
    return serve(scratch=scratch, cwd=scratch)


@pytest.mark.parametrize("name", list(ROWS))
def test_from_pictures_to_a_picture(
    prepare: Program, train: Program, tmp_path: Path, name: str
) -> None:
    row = ROWS[name]
    tiny = row.write(tmp_path / "tiny")
    ended = prepare.run(
        f"source.path={row.source(tmp_path / 'source')}", f"folder={tmp_path / 'set'}",
        f"encoders={row.encoders}", f"encoders.path={tiny}", *row.prepare, "samples_per_shard=4",
        "batch=3", "loaders=2",
    )  # fmt: skip
    assert (ended.code, ended.errors) == (0, []), ended.err
    shards = ShardSet(tmp_path / "set")
    shards.verify()
    row.size.check(
        shards.latent_shape,
        shards.manifest.form.text_width,
        pooled_width=shards.manifest.form.pooled_width,
        references=shards.manifest.form.references,
    )
    assert (shards.null.pooled is not None) == bool(shards.manifest.form.pooled_width)

    words = [
        *row.model, f"init_from={tiny}", f"data.path={tmp_path / 'set'}",
        f"data.heldout={tmp_path / 'set'}", "batch=4", "micro_batch=1", "save_every=0",
        "eval_every=0", "tracking=none", f"folder={tmp_path / 'run'}", "optim.lr=1e-3",
    ]  # fmt: skip
    for engine, steps in LEGS.items():
        group = train.run_group(2, *words, f"engine={engine}", f"steps={steps}")
        assert [one.code for one in group] == [0, 0], group[0].err + group[1].err
        assert [one.errors for one in group] == [[], []]
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    trained = [line for line in lines if "loss/total" in line]
    assert [line["step"] for line in trained] == list(range(7))
    assert all(math.isfinite(line[key]) and line[key] > 0 for line in trained for key in KEYS)

    folder = export(tmp_path / "run", weights=None, step=None, dtype="fp32", out=None)
    (file,) = (folder / "transformer").glob("*.safetensors")
    (before,) = (tiny / "transformer").glob("*.safetensors")
    ours, theirs = load_file(file), load_file(before)
    moved = [key for key in theirs if not ours[key].equal(theirs[key])]
    assert len(moved) > 0.8 * len(theirs)
    assert any("_2." in key for key in ours.keys() - theirs.keys())
    picture = row.draw(tiny, folder)
    assert picture.shape == (SIDE, SIDE, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 0

    pipeline = TwinFlowPipeline.from_pretrained(str(folder), encoders=str(tiny), device="cpu")
    shown = [picture_of(50 + n, SIDE, SIDE) for n in range(row.references)]
    for many, seed in ((None, 0), (2, 1)):
        drawn = pipeline(PROMPT, num_inference_steps=many, seed=seed, pictures=shown)
        assert drawn.tensors.shape == (1, 3, SIDE, SIDE)
        assert bool(drawn.tensors.isfinite().all())


def test_images_are_generated_of_prompts_with_pooled_embeddings(
    prepare: Program, tmp_path: Path
) -> None:
    row = ROWS["sd3"]
    tiny = row.write(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("a red apple\na blue fox\n")
    words = [
        "source=captions", f"source.path={tmp_path / 'prompts.txt'}", "images=generated",
        f"images.sizes=[[{SIDE},{SIDE}]]", f"images.init_from={tiny}", "images.sampler.steps=2",
        f"encoders={row.encoders}", f"encoders.path={tiny}", *row.model,
    ]  # fmt: skip
    ended = prepare.run(*words, f"folder={tmp_path / 'set'}")
    assert (ended.code, ended.errors) == (0, []), ended.err
    shards = ShardSet(tmp_path / "set")
    assert len(shards) == 2
    samples = [shards.read(number) for number in range(2)]
    assert all(bool(sample.image.isfinite().all()) for sample in samples)
    assert not samples[0].pooled[0].equal(samples[1].pooled[0])
    ended = prepare.run(*words, "model.pooled_width=5", f"folder={tmp_path / 'other'}")
    refused(ended, "model.pooled_width is 5", "pooled embeddings have width 12")
