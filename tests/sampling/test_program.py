"""`python -m twinflow_train.sample` as its users meet it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pipelines.qwen_image import SIZE, write_pipeline
from tests.program import Program, refused, serve
from tests.tiny import Tiny, tiny
from twinflow_train.sampling.settings import Changes, Sampling

MODEL = [
    "model=qwen_image",
    *(f"model.{key}={vars(SIZE)[key]}" for key in ("layers", "heads", "head_dim", "text_width")),
    "model.rope=[4,2,2]",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Program:
    scratch = tmp_path_factory.mktemp("sample")
    return serve(scratch=scratch, cwd=scratch, server="tests.sampling.server")


def words(base: Path, folder: Path, *more: str) -> list[str]:
    small = ["height=32", "width=48", f"folder={folder}"]
    return [f"from={base}", "prompts=a", "steps=1", "style=few", *small, *MODEL, *more]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_one_command_draws_pictures_a_grid_and_a_record(
    sample: Program, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n\ntext\n")
    folder = tmp_path / "out"
    more = [f"prompts={tmp_path / 'prompts.txt'}", "images=2", "seed=5", "steps=2"]
    ended = sample.run(*words(base, folder, *more))
    assert (ended.code, ended.errors) == (0, [])
    first, second = ended.out.splitlines()
    assert first.startswith("few 2 NFE: 4 pictures, ")
    assert str(folder / "grid.png") in second
    found = records(folder)
    assert [line["file"] for line in found] == [f"000{p}-{n}.png" for p in (0, 1) for n in (0, 1)]
    assert [line["prompt"] for line in found] == ["a red apple"] * 2 + ["text"] * 2
    assert {line["seed"] for line in found} == {5}
    assert {line["sampler"]["steps"] for line in found} == {2}
    for line in found:
        with Image.open(folder / line["file"]) as image:
            assert image.size == (48, 32)
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 2 * 48


def test_a_base_is_drawn_beside_from_the_same_noise(
    sample: Program, base: Path, tmp_path: Path
) -> None:
    ended = sample.run(*words(base, tmp_path, f"compare={base}", "base.steps=3"))
    assert (ended.code, ended.errors) == (0, [])
    ours, theirs, _ = ended.out.splitlines()
    assert ours.startswith("few 1 NFE: 1 pictures, ")
    assert theirs.startswith("base, multi 6 NFE: 1 pictures, ")
    assert [line["file"] for line in records(tmp_path)] == ["0000-0.png", "0000-0-base.png"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["steps=0"], ["steps is 0"]),
        (["style=fast"], ["style", "few, any, multi"]),
        (["prompts=' '"], ["prompts"]),
        (["prompts=[]"], ["prompts"]),
        (["prompts=3"], ["prompts: 3 is neither a text"]),
        (["height=40"], ["height is 40", "multiple of 16"]),
        (["images=0"], ["images is 0"]),
        (["compare=/nowhere"], ["compare: /nowhere"]),
        (["sampler.gap=3"], ["unknown key 'sampler.gap', did you mean"]),
        (["sampler.stochasticity=2"], ["sampler.stochasticity is 2"]),
        (["sampler.stochasticity=much"], ["sampler.stochasticity"]),
        (["seeds=1"], ["unknown key 'seeds', did you mean 'seed'?"]),
        (["encoders=qwen_image", "encoders.path=/nowhere"], ["encoders.path", "/nowhere"]),
    ],
)
def test_bad_input_is_one_line(
    sample: Program, base: Path, tmp_path: Path, more: list[str], said: list[str]
) -> None:
    refused(sample.run(*words(base, tmp_path / "out", *more)), *said)
    assert not (tmp_path / "out" / "grid.png").exists()


def test_a_prompt_may_be_longer_than_a_file_name(
    sample: Program, base: Path, tmp_path: Path
) -> None:
    prompt = "a very red apple " * 20
    ended = sample.run(*words(base, tmp_path, f"prompts={prompt}"))
    assert (ended.code, ended.errors) == (0, [])
    assert records(tmp_path)[0]["prompt"] == prompt.strip()


def test_from_has_to_be_given(sample: Program) -> None:
    refused(sample.run("prompts=a"), "from has no value: give from=...")


def test_a_run_is_sampled_by_its_export(
    sample: Program, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The tiny run's texts came from no encoder, so what is found says which is missing."""
    run: Tiny = tiny(tmp_path_factory)
    words_of_run = run.words(tmp_path / "run", "steps=1", "evals=none", "save_every=0")
    assert run.program.run(*(w for w in words_of_run if not w.startswith("evals."))).code == 0
    said = json.loads((tmp_path / "run" / "export" / "model.json").read_text())
    assert (said["encoder"], said["null_prompt"]) == ("random", "")
    assert said["model"]["_type"] == "QwenImage"
    ended = sample.run(
        f"from={tmp_path / 'run'}",
        "prompts=a",
        "encoders=pixels",
        "encoders.channels=1",
        "height=28",
    )
    refused(ended, "text_width is 8, the data's text has width 384")


def test_the_options_are_those_that_were_agreed_on() -> None:
    """TWINFLOW_RECORD=1 writes the list anew: only for an option that cannot be a constant."""
    frozen = Path(__file__).parent / "frozen_options.txt"
    found = [f"{key}.{name}" for key, name in options()]
    if os.environ.get("TWINFLOW_RECORD") == "1":
        frozen.write_text("\n".join(found) + "\n")
    assert found == frozen.read_text().split()


def options() -> Iterator[tuple[str, str]]:
    """Yield every key of the configuration, with the part that it belongs to."""
    for kind, part in (("sampling", Sampling), ("sampler", Changes)):
        yield from ((kind, each.name) for each in fields(part))
