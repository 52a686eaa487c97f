"""The command line and what becomes of it: composed, refused in one line, described, frozen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from tests.program import refused
from tests.tiny import ABOUT, Tiny, tiny, write
from twinflow_train.data.manifest import Manifest
from twinflow_train.data.sample import Sample, form_of
from twinflow_train.data.writing import write_null, write_shard
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.launch import compose
from twinflow_train.run import GROUPS, Run, register

CONF = Path(__file__).parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
FROZEN = Path(__file__).parent / "frozen_options.txt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


def composed(*words: str) -> Run:
    """Compose in this process what the command line would give."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(hydra.compose("train", overrides=list(words)))


# What there is


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    found = composed(f"experiment={name}", "steps=2")
    assert isinstance(found, Run)
    assert found.steps == 2


@pytest.mark.parametrize("data", ["digits", "emoji", "emoji_few"])
def test_experiments_hold_what_their_names_say(data: str) -> None:
    base, ours = composed(f"experiment={data}_flow"), composed(f"experiment={data}_twinflow")
    assert (base.name, ours.name) == (f"{data}_flow", f"{data}_twinflow")
    assert data.replace("_", "-") in ours.data.path
    assert ours.init_from == f"{base.folder}/export"
    assert base.model == ours.model
    assert base.objective.order == 0 < ours.objective.order


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group in GROUPS for option in GROUPS[group]]
)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    needed = ("steps=1", "batch=8", "micro_batch=8", "init_from=c", "data.path=a", "data.heldout=b")
    assert composed(f"{group}={option}", *needed).__dict__[group] == (
        GROUPS[group][option] if group != "data" else composed(*needed).data
    )


def options() -> Iterator[str]:
    """List every group's options and every key, also those of the things in lists."""
    hints = get_type_hints(Run)
    for f in fields(Run):
        if is_dataclass(hints[f.name]) and f.name not in GROUPS:
            yield from keys(hints[f.name], f.name)
        elif f.name not in GROUPS:
            yield f.name
    for group, found in GROUPS.items():
        yield from (f"{group}={option}" for option in found)
        yield from dict.fromkeys(
            key for option in found.values() for key in keys(type(option), group)
        )


def keys(kind: type, prefix: str) -> Iterator[str]:
    """List the keys of a dataclass."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        inner, name = hints[f.name], f"{prefix}.{f.name}"
        if get_args(inner) and is_dataclass(element := get_args(inner)[0]):
            inner, name = element, f"{name}[]"
        if is_dataclass(inner):
            assert isinstance(inner, type)
            yield from keys(inner, name)
        else:
            yield name


def test_the_options_are_those_that_were_agreed_on() -> None:
    """TWINFLOW_RECORD=1 writes the list anew: only for an option that cannot be a constant."""
    found = list(options())
    if os.environ.get("TWINFLOW_RECORD") == "1":
        FROZEN.write_text("\n".join(found) + "\n")
    frozen = FROZEN.read_text().split()
    new, gone = [key for key in found if key not in frozen], set(frozen) - set(found)
    assert not new, f"new options: {new}. If none can be a constant, add to {FROZEN.name}"
    assert not gone, f"options that are gone: {sorted(gone)}. Remove them from {FROZEN.name}"
    assert found == frozen


def test_help_is_for_people(run: Tiny) -> None:
    ended = run.program.run("--help")
    assert (ended.code, ended.err) == (0, "")
    text = ended.out.splitlines()
    assert len(text) < 150
    # Hydra writes the options of a group in one line, and experiments are many.
    assert max(len(line) for line in text if not line.startswith("experiment: ")) <= 148
    listed = {line.strip() for line in text}
    for group, found in GROUPS.items():
        assert f"{group}: {', '.join(sorted(found))}" in listed
    written = {line.strip().partition(":")[0] for line in text}
    assert {f.name for f in fields(Run)} <= written
    assert {"lr", "guidance", "precision", "layers"} <= written
    assert "python -m twinflow_train.train experiment=digits_twinflow" in listed


def test_cfg_job_prints_the_configuration_and_makes_nothing(run: Tiny, tmp_path: Path) -> None:
    ended = run.program.run(*run.words(tmp_path / "run"), "--cfg", "job")
    assert (ended.code, ended.err) == (0, "")
    assert "micro_batch: 4" in ended.out.splitlines()
    assert not (tmp_path / "run").exists()


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stepz=3", ["'stepz'", "did you mean 'steps'", "micro_batch"]),
        ("objective.time_weigth=1", ["'objective.time_weigth'", "'time_weight'"]),
        ("evals.samplers=[{step: 1}]", ["'step'", "'steps'"]),
        ("+extra=1", ["unknown key", "extra"]),
        ("+objective.extra=1", ["unknown key", "objective.extra"]),
        ("steps=abc", ["steps", "abc", "Integer"]),
        ("seed=1.5", ["seed", "1.5", "Integer"]),
        ("name=null", ["name", "not Optional"]),
        ("objective.shares=1", ["objective.shares", "Shares"]),
        ("engine.precision=fp8", ["engine.precision", "fp8", "fp32, bf16"]),
        ("resume=maybe", ["resume", "maybe", "auto, must, never"]),
        ("steps=0", ["steps must be at least 1", "0"]),
        ("log_every=-1", ["log_every must be 0 or more", "-1"]),
        ("optim.lr=-1", ["optim.lr is -1.0; it must be positive"]),
        ("optim.lr=nan", ["optim.lr is nan; it must be positive"]),
        ("optim.betas=[0.9]", ["optim.betas is [0.9]; it must be two numbers in [0, 1)"]),
        ("evals.samplers=[{steps: 0}]", ["sampler", "steps", "at least 1"]),
        ("data.window=0", ["data.window", "1..256"]),
        ("faults.budget=-1", ["faults.budget is -1; it must be 0 or more"]),
        ("faults.slow_above=1", ["faults.slow_above is 1.0; it must be above 1, or 0"]),
        ("profile.steps=10", ["profile.steps is 10", "FIRST:END", "10:13"]),
        ("profile.steps=5:3", ["profile.steps is 5:3, which are 0 steps", "1 to 100"]),
        ("profile.steps=0:101", ["profile.steps is 0:101, which are 101 steps"]),
        ("profile.steps=11:13", ["profile.steps is 11:13", "the run has 12 steps"]),
        ("terms_every=3 log_every=2", ["terms_every = 3", "multiple of log_every = 2"]),
        ("terms_every=3 log_every=0", ["terms_every = 3", "log_every = 0"]),
        ("batch=10", ["batch = 10", "micro_batch = 4"]),
        ("objective.shares.fake=0.001", ["objective.shares.fake", "batch = 8"]),
        ("model=nope", ["model", "nope", "qwen_image"]),
        ("experiment=nope", ["experiment", "nope", "digits_flow", "digits_twinflow"]),
        ("batch=???", ["batch has no value"]),
        ("data.path=???", ["data.path has no value"]),
        ("folder=${nope}", ["folder", "nope"]),
        ("steps", ["steps"]),
        ("=3", ["=3"]),
        ("~steps", ["steps"]),
        ("name=$(touch made)", ["name"]),
    ],
)
def test_bad_words_are_one_line(run: Tiny, tmp_path: Path, change: str, words: list[str]) -> None:
    changes = change.split() if "log_every" in change else [change]
    refused(run.program.run(*run.words(tmp_path / "run"), *changes), *words)
    assert not (tmp_path / "run").exists()
    assert not list(run.folder.glob("made*"))


def test_without_any_word_it_asks_for_one(run: Tiny) -> None:
    refused(run.program.run(), "has no value: give ")


def test_of_several_ranks_one_speaks_or_each_says_its_name(run: Tiny, tmp_path: Path) -> None:
    for change in ("steps=abc", "steps=0", "stepz=1"):
        ended = run.program.run_group(2, *run.words(tmp_path / "run"), change)
        assert [one.code for one in ended] == [2, 2]
        said = [line for one in ended for line in one.err.splitlines()]
        assert len(said) == 1 or all("rank" in line for line in said), said


# What a configuration says of itself


def test_the_configuration_is_plain_json(run: Tiny) -> None:
    config = composed(*run.words("out")).config()
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert config["model"] == {
        "_type": "QwenImage", "layers": 1, "heads": 2, "head_dim": 8, "text_width": 8,
        "channels": 1, "patch": 7, "rope": [2, 2, 4], "target_time": "embedder",
    }  # fmt: skip
    assert config["resume"] == "auto"
    assert config["evals"]["samplers"][1]["stochasticity"] == 1.0


@pytest.mark.parametrize(
    "change",
    ["model.layers=2", "objective.delta=0.02", "objective=twinflow_paper", "seed=1", "batch=16",
     "init_from=null", "data.window=2", "average.slow=0.9"],
)  # fmt: skip
def test_the_identity_changes_with_what_defines_the_run(run: Tiny, change: str) -> None:
    ours, theirs = composed(*run.words("out")), composed(*run.words("out"), change)
    assert ours.identity() != theirs.identity()


def test_the_identity_s_defaults_are_those_of_its_parts(run: Tiny) -> None:
    plainest = composed(*run.words("out")).defaults()
    assert plainest["model"]["target_time"] == "embedder"
    assert plainest["objective"]["delta"] == 0.01
    assert plainest["average"]["slow"] == 0.0
    other = composed(*run.words("out"), "objective.delta=0.1", "average.slow=0.5").defaults()
    assert other == plainest


def test_the_identity_is_of_the_data_and_not_of_their_folder(run: Tiny, tmp_path: Path) -> None:
    def identity(*rows: int, note: str = "") -> dict[str, Any]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        write(folder, range(*rows), note=note)
        return composed(*run.words("out"), f"data.path={folder}").identity()

    first = identity(0, 100, 10)
    assert identity(0, 100, 10) == first
    assert identity(0, 90, 10) != first
    assert identity(0, 100, 10, note=".") != first


@pytest.mark.parametrize(
    "change",
    ["steps=99", "name=other", "folder=other", "micro_batch=8", "optim.lr=1", "save_every=1",
     "data.prefetch=0", "engine.recompute=1", "evals=none", "resume=never"],
)  # fmt: skip
def test_the_identity_stays_with_what_does_not(run: Tiny, change: str) -> None:
    words = [word for word in run.words("out") if not word.startswith("evals.")]
    assert composed(*words).identity() == composed(*words, change).identity()


def test_a_batch_is_dealt_to_the_ranks_or_refused(run: Tiny) -> None:
    found = composed(*run.words("out"), "batch=24")
    for ranks, micro_steps in ((1, 6), (2, 3), (3, 2), (6, 1)):
        world = World(rank=0, size=ranks, device=torch.device("cpu"))
        assert found.deal(world).micro_steps == micro_steps
    with pytest.raises(UserError, match=r"batch = 24 does not divide by .* 4 x 4"):
        found.deal(World(rank=0, size=4, device=torch.device("cpu")))


def set_of(folder: Path, *, width: int, latents: bool = True) -> Path:
    """Write a set of one shard, whose texts have a width, with or without latents."""
    text, shape = torch.randn(2, width), (1, 28, 28)
    samples = [
        Sample(
            key=f"s{n}",
            latent=torch.zeros(shape) if latents else None,
            texts=[text],
            captions=["a"],
            fields={"label": n},
        )
        for n in range(10)
    ]
    folder.mkdir()
    form = form_of(samples[0])
    shard = write_shard(folder / "000000.tar", samples, form, latent_shape=shape)
    null = write_null(folder, text)
    Manifest(about=ABOUT, form=form, null_sha256=null, shards=(shard,)).write(folder)
    return folder


def test_prompts_without_images_are_for_image_free_training_alone(
    run: Tiny, tmp_path: Path
) -> None:
    world = World(rank=0, size=1, device=torch.device("cpu"))
    prompts = set_of(tmp_path / "prompts", width=8, latents=False)
    words = [*run.words(tmp_path / "run"), f"data.path={prompts}", "evals=none"]
    words = [word for word in words if not word.startswith("evals.")]
    composed(*words, "objective=twinflow_image_free", "objective.guidance=4").check(world)
    with pytest.raises(UserError, match=r"data\.path holds prompts.*twinflow_image_free"):
        composed(*words).check(world)
    with pytest.raises(UserError, match=r"data\.heldout holds prompts"):
        composed(*words, f"data.path={run.folder / 'train'}", f"data.heldout={prompts}").check(
            world
        )


def test_held_out_texts_of_another_width_are_refused(run: Tiny, tmp_path: Path) -> None:
    wide = set_of(tmp_path / "wide", width=9)
    words = [w for w in run.words(tmp_path / "run") if not w.startswith("evals.")]
    found = composed(*words, "evals=none", f"data.heldout={wide}")
    with pytest.raises(UserError, match=r"data\.heldout has texts of width 9 .* of 8"):
        found.check(World(rank=0, size=1, device=torch.device("cpu")))
