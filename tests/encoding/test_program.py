"""`python -m twinflow_train.prepare` as its users meet it, and training on what it made."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.encoding.jobs import pipeline
from tests.encoding.tools import encoded, picture, write_folder, write_parquet, write_tar
from tests.pipelines.qwen_image import SIZE
from tests.program import Program, Running, refused, serve
from tests.test_run import keys
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.settings import KEEPING, Preparation
from twinflow_train.prepare import GROUPS

MODEL = [
    *(f"model.{key}={vars(SIZE)[key]}" for key in ("layers", "heads", "head_dim", "text_width")),
    "model.rope=[4,2,2]",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory)


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Program:
    scratch = tmp_path_factory.mktemp("prepare")
    return serve(scratch=scratch, cwd=scratch, server="tests.encoding.server")


def words(tiny: Path, source: Path, folder: Path, *more: str) -> list[str]:
    small = [] if any(word.startswith("images=") for word in more) else ["images.side=64"]
    return [
        f"source.path={source}", f"folder={folder}", f"encoders.path={tiny}", *small,
        "samples_per_shard=2", "batch=2", "loaders=2", *more,
    ]  # fmt: skip


def records(folder: Path) -> list[Path]:
    return sorted((folder / KEEPING).glob("[0-9]*.json"))


def await_records(folder: Path, many: int, process: Running) -> None:
    deadline = time.monotonic() + 120
    while len(records(folder)) < many:
        assert process.alive, process.wait().err
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_command_makes_a_set_and_says_so(prepare: Program, tiny: Path, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", range(9))
    (source / "alone.png").write_bytes(encoded(picture(1)))
    ended = prepare.run(*words(tiny, source, tmp_path / "set", "verify=true", "licence=mine"))
    assert (ended.code, ended.errors) == (0, [])
    assert "9/9" in ended.err
    assert "sample/s" in ended.err or "s/sample" in ended.err
    first, second, *rest = ended.out.splitlines()
    assert first.startswith("worker 1 of 1: 9 samples in 5 shards in ")
    assert first.endswith(" samples/s)")
    assert second.startswith(f"{tmp_path / 'set'} is whole: 9 samples in 5 shards, ")
    assert second.endswith("1 items left out")
    assert "  latents of 16x8x8: 5 samples" in rest
    assert any("there is no alone.txt beside it; skipped.jsonl has all" in line for line in rest)
    assert any("64x64: PSNR " in line for line in rest)
    shards = ShardSet(tmp_path / "set")
    shards.verify()
    assert (len(shards), shards.manifest.about.licence) == (9, "mine")


def test_killed_workers_lose_a_shard_each_and_others_finish(
    prepare: Program, tiny: Path, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "source", range(60))
    alone = prepare.run(*words(tiny, source, tmp_path / "alone"))
    assert alone.code == 0, alone.err
    folder = tmp_path / "killed"
    with prepare.group(2, *words(tiny, source, folder)) as workers:
        await_records(folder, 3, workers[0])
        for worker in workers:
            worker.send(signal.SIGKILL)
        assert [worker.wait().code for worker in workers] == [-signal.SIGKILL] * 2
    done = {path: path.stat().st_mtime_ns for path in records(folder)}
    assert 3 <= len(done) < 30
    assert not (folder / "manifest.json").exists()
    ended = prepare.run_group(3, *words(tiny, source, folder))
    assert [one.code for one in ended] == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert sum(int(one.out.split(" shards in ")[0].split()[-1]) for one in ended) == 31 - len(done)
    assert any("is whole: 60 samples in 31 shards" in one.out for one in ended)
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert made == {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir() if p.is_file()}


def test_the_tasks_of_a_job_array_share_the_work(
    prepare: Program, tiny: Path, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "source", range(9))
    outs = []
    for task in (4, 5):
        env = {
            "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_ARRAY_TASK_MIN": "4",
        }  # fmt: skip
        ended = prepare.start(*words(tiny, source, tmp_path / "set"), env=env).wait()
        assert ended.code == 0, ended.err
        outs.append(ended.out)
    assert outs[0].startswith("worker 1 of 2: ")
    assert "is not whole yet: 2 shards are with other workers" in outs[0]
    assert "is whole: 9 samples in 5 shards" in outs[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("source=nope", ["source", "nope", "captions", "parquet"]),
        ("source=captions", ["captions and no pictures", "images=none"]),
        ("images=none", ["has pictures", "images=stored"]),
        ("source.path=???", ["source.path has no value: give source.path=..."]),
        ("folder=???", ["folder has no value: give folder=..."]),
        ("sorce.path=x", ["'sorce", "'source'"]),
        ("images.sde=3", ["'images.sde'", "'side'"]),
        ("images.side=0", ["images.side is 0; it must be at least 1"]),
        ("latents=fp16", ["latents", "fp16", "fp32, bf16"]),
        ("encoders.path=Some/Model", ["encoders.path: Some/Model is neither", "hf download"]),
        ("source.path=nowhere", ["source.path: nowhere does not exist"]),
        ("batch=0", ["batch is 0; it must be at least 1"]),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    prepare: Program, tiny: Path, tmp_path: Path, change: str, said: list[str]
) -> None:
    ended = prepare.run(*words(tiny, tmp_path, tmp_path / "set", change))
    refused(ended, *said)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_what_is_finished_stays(
    prepare: Program, tiny: Path, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "source", range(8))
    env = {"RANK": "0", "WORLD_SIZE": "4"}
    assert prepare.start(*words(tiny, source, tmp_path / "set"), env=env).wait().code == 0
    (tmp_path / "set" / "000001.tar").mkdir()  # no file can take its place
    ended = prepare.run(*words(tiny, source, tmp_path / "set"))
    refused(ended, "folder: ", "000001.tar cannot be written", "what is finished stays")
    (tmp_path / "set" / "000001.tar").rmdir()
    ended = prepare.run(*words(tiny, source, tmp_path / "set"))
    assert ended.code == 0, ended.err
    assert len(ShardSet(tmp_path / "set")) == 8


def test_help_is_for_people(prepare: Program) -> None:
    ended = prepare.run("--help")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.strip() for line in ended.out.splitlines()]
    assert max(map(len, lines)) <= 110
    for group, options in GROUPS.items():
        (line,) = (line for line in lines if line.startswith(f"{group}: "))
        assert all(option in line for option in options)
    written = {line.partition(":")[0] for line in lines}
    assert {f.name for f in fields(Preparation)} <= written


def options() -> Iterator[str]:
    """List every group's options and every key."""
    yield from (f.name for f in fields(Preparation) if f.name not in GROUPS)
    for group, found in GROUPS.items():
        yield from (f"{group}={option}" for option in found)
        if group != "model":
            kinds = [type(option) for option in found.values()]
            yield from dict.fromkeys(key for kind in kinds for key in keys(kind, group))


def test_the_options_are_those_that_were_agreed_on() -> None:
    """TWINFLOW_RECORD=1 writes the list anew: only for an option that cannot be a constant."""
    frozen = Path(__file__).parent / "frozen_options.txt"
    found = list(options())
    if os.environ.get("TWINFLOW_RECORD") == "1":
        frozen.write_text("\n".join(found) + "\n")
    assert found == frozen.read_text().split()


# The whole way: a source of each kind, prepared and trained on.


def write_source(kind: str, root: Path) -> Path:
    files = {f"{n}": encoded(picture(n)) for n in range(8)}
    if kind == "folder":
        return write_folder(root, range(0, 32, 4))
    if kind == "webdataset":
        texts = {f"{n}.txt": f"picture {n}".encode() for n in files}
        return write_tar(root / "1.tar", {f"{n}.png": data for n, data in files.items()} | texts)
    if kind == "parquet":
        columns: dict[str, list[Any]] = {
            "text": [f"picture {n}" for n in files],
            "image_bytes": list(files.values()),
        }
        return write_parquet(root / "1.parquet", columns)
    root.mkdir()
    (root / "prompts.txt").write_text("\n".join(f"picture {n}" for n in files))
    return root


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Program:
    scratch = tmp_path_factory.mktemp("train")
    return serve(scratch=scratch, cwd=scratch)


@pytest.mark.parametrize(
    ("kind", "images", "objective"),
    [
        ("folder", "stored", "twinflow"),
        ("webdataset", "stored", "rcgm"),
        ("parquet", "stored", "flow_matching"),
        ("captions", "generated", "twinflow"),
        ("captions", "none", "twinflow_image_free"),
    ],
)
def test_what_was_prepared_is_trained_on(
    prepare: Program,
    train: Program,
    tiny: Path,
    tmp_path: Path,
    kind: str,
    images: str,
    objective: str,
) -> None:
    source = write_source(kind, tmp_path / "source")
    more = {
        "stored": ["images.side=64"],
        "none": ["images.sizes=[[64,64]]"],
        "generated": ["images.sizes=[[64,64]]", f"images.init_from={tiny}",
                      "images.sampler.steps=2", *MODEL],
    }  # fmt: skip
    chosen = (f"source={kind}", f"images={images}", "heldout=0.4", *more[images])
    ended = prepare.run(*words(tiny, source, tmp_path / "set", *chosen))
    assert ended.code == 0, ended.err
    sets = [tmp_path / "set" / name for name in ("heldout", "train")]
    assert [f"{path} is whole" in ended.out for path in sets] == [True, True]
    assert sum(len(ShardSet(path)) for path in sets) == 8
    ended = train.run(
        *MODEL, "engine.precision=fp32", f"init_from={tiny}", f"objective={objective}",
        f"data.heldout={sets[0]}", f"data.path={sets[1]}", "tracking=none",
        "steps=3", "batch=4", "micro_batch=4", "save_every=0", f"folder={tmp_path / 'run'}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [said["loss/total"] for said in map(json.loads, lines) if "loss/total" in said]
    assert len(losses) == 3
    assert all(isinstance(loss, float) and loss > 0 for loss in losses)
