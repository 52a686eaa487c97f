"""`python -m twinflow_train.evaluate` as its users meet it, on a tiny pipeline."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.evals.digits import images as digits
from tests.evaluate.test_suites import LINES
from tests.pipelines.features import write_clip, write_dinov2
from tests.pipelines.qwen_image import SIZE, write_pipeline
from tests.program import Program, refused, serve
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.evals.grid import picture
from twinflow_train.evaluate.__main__ import GROUPS
from twinflow_train.evaluate.settings import Baseline, Evaluating
from twinflow_train.files import sha256
from twinflow_train.models.codec import Encoders
from twinflow_train.models.qwen_codec import QwenImageEncoders

MODEL = [
    "model=qwen_image",
    *(f"model.{key}={vars(SIZE)[key]}" for key in ("layers", "heads", "head_dim", "text_width")),
    "model.rope=[4,2,2]",
]
PROMPTS = "[a red apple,the color,text,size and shape,objects]"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Program:
    scratch = tmp_path_factory.mktemp("evaluate")
    return serve(scratch=scratch, cwd=scratch, server="tests.evaluate.server")


def words(base: Path, folder: Path, *more: str) -> list[str]:
    small = ["height=32", "width=48", f"folder={folder}", "style=few", "nfe=[1,2]"]
    asked = [] if any(w.startswith("suite=") for w in more) else [f"suite.prompts={PROMPTS}"]
    return [f"from={base}", *asked, *small, *MODEL, *more]


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["results"]
    return found


def sums(folder: Path) -> dict[str, str]:
    """Return the checksum of every picture."""
    return {
        str(file.relative_to(folder)): sha256(file)
        for file in sorted(folder.rglob("pictures/**/*.png"))
    }


def write_real(folder: Path) -> Path:
    """Write real digits as pictures."""
    folder.mkdir()
    for n, each in enumerate(((digits()[0][::250, 0] + 1) * 127.5).byte()):
        Image.fromarray(each.numpy()).convert("RGB").resize((48, 32)).save(folder / f"{n}.png")
    return folder


def write_latents(folder: Path) -> ShardSet:
    """Write a set of latents of the tiny pipeline's VAE."""
    draws = torch.Generator().manual_seed(0)
    samples = [
        Sample(key=f"{n:04d}", latent=torch.randn(16, 4, 6, generator=draws),
               texts=[torch.zeros(1, 16)], captions=[f"prompt {n}"])
        for n in range(7)
    ]  # fmt: skip
    about = About(encoder="tiny", revision="sha256:0", null_prompt="", licence="test")
    return write_shards(folder, samples, null=torch.zeros(1, 16), about=about)


def write_prompts_alone(folder: Path, shards: ShardSet) -> Path:
    """Write a set again without its latents."""
    samples = [replace(shards.read(n), latent=None) for n in range(2)]
    about, shape = shards.manifest.about, shards.latent_shape
    write_shards(folder, samples, null=torch.zeros(1, 16), about=about, latent_shape=shape)
    return folder


def test_one_command_draws_scores_and_writes_tables_and_a_plot(
    evaluate: Program, base: Path, tmp_path: Path
) -> None:
    out, clip = tmp_path / "out", write_clip(tmp_path / "clip")
    real = write_real(tmp_path / "real")
    more = [f"compare={base}", "base.steps=3", "features=clip", f"features.path={clip}",
            f"real={real}", "suite.images=2"]  # fmt: skip
    ended = evaluate.run(*words(base, out, *more))
    assert (ended.code, ended.errors) == (0, [])
    rows = results(out)
    assert [(r["model"], r["nfe"], r["style"]) for r in rows] == [
        ("tiny", 1, "few"), ("tiny", 2, "few"), ("base", 6, "multi"),
    ]  # fmt: skip
    for row in rows:
        for score in ("frechet", "kernel", "precision", "recall", "density", "coverage",
                      "seed_diversity", "clip_score", "seconds_per_image", "latency",
                      "images_per_second"):  # fmt: skip
            assert row[score] is not None, score
        assert row["seed_diversity"] > 0
        assert row["frechet"] > 0
    assert "| base" in (out / "results.md").read_text()
    assert "bias of few pictures" in (out / "results.md").read_text()
    with (out / "results.csv").open() as file:
        sheet = list(csv.DictReader(file))
    assert [float(r["frechet"]) for r in sheet] == [r["frechet"] for r in rows]
    for name in ("quality.png", "grid.png"):
        with Image.open(out / name) as opened:
            assert opened.width > 300
    assert "images/s" in ended.out
    pictures = sums(out)
    assert len(pictures) == 3 * 5 * 2
    assert len(set(pictures.values())) == len(pictures), "no picture is drawn twice"


def test_ranks_change_nothing(evaluate: Program, base: Path, tmp_path: Path) -> None:
    """Five prompts divide by neither two nor four."""
    net = write_dinov2(tmp_path / "dinov2")
    more = ["nfe=[2]", "batch=1", "features=dinov2", f"features.path={net}",
            f"real={write_real(tmp_path / 'real')}"]  # fmt: skip
    alone = evaluate.run(*words(base, tmp_path / "1", *more))
    assert (alone.code, alone.errors) == (0, [])
    for ranks in (2, 4):
        ended = evaluate.run_group(ranks, *words(base, tmp_path / str(ranks), *more))
        assert [(one.code, one.errors) for one in ended] == [(0, [])] * ranks
        assert all(not one.out for one in ended[1:])
        assert sums(tmp_path / str(ranks)) == sums(tmp_path / "1")
        (first,), (here,) = results(tmp_path / "1"), results(tmp_path / str(ranks))
        for score in ("frechet", "kernel", "precision", "coverage"):
            assert here[score] == first[score], score


def test_real_pictures_may_be_a_set_of_shards(
    evaluate: Program, base: Path, tmp_path: Path
) -> None:
    """Its latents are decoded by the model's own decoder, once, and then stand as pictures do."""
    shards, net = write_latents(tmp_path / "set"), write_dinov2(tmp_path / "dinov2")
    more = ["nfe=[1]", "features=dinov2", f"features.path={net}"]
    out = tmp_path / "out"
    ended = evaluate.run(*words(base, out, *more, f"real={shards.folder}"))
    assert (ended.code, ended.errors) == (0, [])
    encoders: Encoders = QwenImageEncoders(path=str(base))
    codec = encoders.open(encoders.find(), torch.device("cpu"))
    (real,) = out.glob("real-*")
    files = sorted(real.iterdir())
    assert [file.name for file in files] == [f"{n:06d}.png" for n in range(len(shards))]
    for number, file in enumerate(files):
        wanted = picture(codec.decode(shards.read(number).image[None])[0])
        with Image.open(file) as opened:
            assert list(opened.getdata()) == list(wanted.getdata())
    again = tmp_path / "again"
    assert evaluate.run(*words(base, again, *more, f"real={real}")).code == 0
    (one,), (other,) = results(out), results(again)
    for score in ("frechet", "kernel"):
        assert one[score] == other[score] is not None, score
    alone = write_prompts_alone(tmp_path / "alone", shards)
    ended = evaluate.run(*words(base, out, *more, f"real={alone}"))
    refused(ended, f"real: {alone} holds prompts alone")
    ended = evaluate.run(*words(base, out, *more, f"real={tmp_path / 'nowhere'}"))
    refused(ended, "real:", "holds no pictures")


def test_a_killed_evaluation_goes_on(evaluate: Program, base: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert evaluate.run(*words(base, whole, "batch=1")).code == 0
    running = evaluate.start(*words(base, killed, "batch=1"))
    deadline = time.monotonic() + 120
    while len(sums(killed)) < 2:
        assert running.alive
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send(signal.SIGTERM)
    assert running.wait().code == -signal.SIGTERM
    before = {file: (killed / file).stat().st_mtime_ns for file in sums(killed)}
    assert not (killed / "results.json").exists()
    ended = evaluate.run(*words(base, killed, "batch=1"))
    assert (ended.code, ended.errors) == (0, [])
    assert sums(killed) == sums(whole)
    # The last may have stood without its times.
    kept = [file for file in before if (killed / file).stat().st_mtime_ns == before[file]]
    assert len(kept) >= len(before) - 1
    again = {file: (killed / file).stat().st_mtime_ns for file in sums(killed)}
    assert evaluate.run(*words(base, killed, "batch=1")).code == 0, "and scores once more"
    assert {file: (killed / file).stat().st_mtime_ns for file in sums(killed)} == again
    refused(evaluate.run(*words(base, killed, "batch=1", "seed=1")), "pictures of other seed")


def test_genevals_pictures_and_scores_go_there_and_back(
    evaluate: Program, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    out = tmp_path / "out"
    line = words(base, out, "suite=geneval", f"suite.prompts={tmp_path / 'meta.jsonl'}", "nfe=[1]")
    assert evaluate.run(*line).code == 0
    entry = out / "tiny" / "nfe1"
    assert sorted(os.listdir(entry / "pictures")) == ["00000", "00001", "00002"]
    assert len(os.listdir(entry / "pictures" / "00002" / "samples")) == 4
    assert "geneval" not in results(out)[0]
    said = [{"tag": row["tag"], "correct": n == 1} for n, row in enumerate(LINES)]
    (entry / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    ended = evaluate.run(*line)
    assert ended.code == 0
    assert "GenEval" in ended.out
    assert results(out)[0]["geneval"] == pytest.approx(1 / 3)


def test_dpgs_pictures_are_squares_named_as_prompts(
    evaluate: Program, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").mkdir()
    for name in ("7", "drawtext3"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a vase {name}")
    out = tmp_path / "out"
    more = ["suite=dpg", f"suite.prompts={tmp_path / 'prompts'}", "nfe=[1]", "width=32"]
    assert evaluate.run(*words(base, out, *more)).code == 0
    folder = out / "tiny" / "nfe1" / "pictures"
    assert sorted(os.listdir(folder)) == ["7.png", "drawtext3.png"]
    with Image.open(folder / "7.png") as opened:
        assert opened.size == (64, 64)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["nfe=[0]"], ["nfe is [0]"]),
        (["nfe=[]"], ["nfe is []"]),
        (["nfe=[1,1]"], ["nfe is [1, 1]"]),
        (["nfe=[one]"], ["nfe"]),
        (["style=fast"], ["style", "few, any, multi"]),
        (["suite.prompts=[]"], ["suite.prompts: there is no prompt"]),
        ([f"suite.prompts=[a,{'red ' * 1100}]"], ["tokens, and ", "the text encoder reads 1024"]),
        (["suite=everything"], ["suite"]),
        (["batch=0"], ["batch is 0"]),
        (["height=40"], ["height is 40", "multiple of 16"]),
        (["compare=/nowhere"], ["compare: /nowhere"]),
        (["also=[/nowhere]"], ["also: /nowhere"]),
        (["features=dinov2", "features.path=/nowhere"], ["features.path", "hf download"]),
        (["real=/nowhere"], ["real is compared in a network's features"]),
        (["baseline.lora=x"], ["baseline.lora needs baseline.pipeline"]),
        (["baseline.pipeline=/nowhere"], ["baseline.pipeline: /nowhere has no model_index.json"]),
        (["baseline.steps=0"], ["baseline.steps is 0"]),
        (["folders=x"], ["unknown key 'folders', did you mean 'folder'?"]),
    ],
)
def test_bad_input_is_one_line(
    evaluate: Program, base: Path, tmp_path: Path, more: list[str], said: list[str]
) -> None:
    refused(evaluate.run(*words(base, tmp_path / "out", *more)), *said)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_run_without_an_export_says_how_to_make_one(evaluate: Program, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    ended = evaluate.run(f"from={tmp_path}", "suite.prompts=a", f"folder={tmp_path / 'out'}")
    refused(ended, "has no export yet", "python -m twinflow_train.export")


def test_help_names_the_groups(evaluate: Program) -> None:
    ended = evaluate.run("--help")
    assert ended.code == 0
    for group in ("suite", "features"):
        assert f"{group}: {', '.join(sorted(GROUPS[group]))}" in ended.out or all(
            option in ended.out for option in GROUPS[group]
        )


def test_the_options_are_those_that_were_agreed_on() -> None:
    """TWINFLOW_RECORD=1 writes the list anew: only for an option that cannot be a constant."""
    frozen = Path(__file__).parent / "frozen_options.txt"
    found = [f"{key}.{name}" for key, name in options()]
    if os.environ.get("TWINFLOW_RECORD") == "1":
        frozen.write_text("\n".join(found) + "\n")
    assert found == frozen.read_text().split()


def options() -> Iterator[tuple[str, str]]:
    """Yield every key of the configuration, with the part that it belongs to."""
    yield from (("evaluating", each.name) for each in fields(Evaluating))
    yield from (("baseline", each.name) for each in fields(Baseline))
    for group in ("suite", "features"):
        for name, option in GROUPS[group].items():
            yield from ((f"{group}={name}", each.name) for each in fields(option))
