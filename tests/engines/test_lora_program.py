"""LoRA runs as their users meet them: a command line, a folder, an export, and words of refusal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.families import FAMILIES, filled
from tests.models.test_lora import close
from tests.program import refused
from tests.test_run import composed
from tests.tiny import ROPE, SIZE, STEPS, WIDTH, Tiny, checkpoints, curve, steps, tiny
from twinflow_train.batch import Condition
from twinflow_train.errors import UserError
from twinflow_train.export import export
from twinflow_train.models.adapter import BASE
from twinflow_train.models.lora import LoRA
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.weights import LORA_FILE, WEIGHTS
from twinflow_train.objectives import presets
from twinflow_train.reporting import card

MODEL = QwenImage(**SIZE, rope=ROPE, text_width=WIDTH)
LORA = ("adapter=lora", "adapter.rank=2", "adapter.alpha=3")
SECOND = f"{MODEL.second.name}.safetensors"
PUBLISHED = [
    "qwen_image_lora",
    "qwen_image_lora_order1",
    "qwen_image_edit_lora",
    "sd35_medium_lora",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def made(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny run as a LoRA, on two ranks, with a second average."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    words = run.words(folder, *LORA, "average.slow=0.9", "keep_last=5")
    ended = run.program.run_group(2, *words)
    assert [one.code for one in ended] == [0, 0], ended
    assert "M frozen ones on 2 x cpu" in ended[0].out
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA_FILE) | load_file(folder / SECOND)


# The folder and what goes out


def test_checkpoints_and_exports_leave_the_base_out(run: Tiny, made: Path) -> None:
    base = run.folder / "base" / "transformer" / f"{WEIGHTS}.safetensors"
    assert checkpoints(made) == ["step-00000004", "step-00000008", "step-00000012"]
    whole = sum(p.numel() for p in MODEL.build().parameters())
    adapted = sum(tensor.numel() for tensor in tensors(made / "export").values())
    saved = made / "checkpoints" / "step-00000012"
    numbers = sum(
        tensor.numel()
        for path in saved.glob("*.safetensors")
        for tensor in load_file(path).values()
    )
    assert numbers == 5 * adapted < 5 * whole
    assert base.is_file()
    assert not (made / "export" / "transformer").exists()


def test_a_saved_step_gives_what_the_run_exported(made: Path, tmp_path: Path) -> None:
    ours = export(made, weights=None, step=None, dtype="fp32", out=tmp_path / "out")
    ours_there, theirs = tensors(ours), tensors(made / "export")
    assert ours_there.keys() == theirs.keys()
    assert all(torch.equal(ours_there[name], theirs[name]) for name in theirs)
    raw = tensors(export(made, weights="raw", step=None, dtype="fp32", out=tmp_path / "raw"))
    assert not all(torch.equal(raw[name], theirs[name]) for name in theirs)


def test_the_card_names_the_files_and_the_settings(made: Path) -> None:
    said = (made / "export" / card.CARD).read_text()
    assert f"`{LORA_FILE}`, a LoRA of rank 2" in said
    assert f"`{SECOND}`, the embedder of the target time, hold the averaged weights" in said
    assert "adapter LoRA: rank 2, alpha 3.0" in said
    assert "start: base" in said


@torch.no_grad()
def test_merged_it_is_the_network_that_was_trained(run: Tiny, made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twinflow_train.export", str(made), "--merge"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    folder = Path(ended.stdout.strip())
    assert folder == made / "export-00000012-ema-merged"
    assert "`transformer/` holds the averaged" in (folder / card.CARD).read_text()

    lora, base = LoRA(rank=2, alpha=3.0), MODEL.stored_weights(run.folder / "base")
    (found,) = lora.assemble(MODEL, [])
    found.net.to_empty(device="cpu")
    values = {name.removeprefix("transformer."): t for name, t in tensors(made / "export").items()}
    for kind, name, p in found.tensors():
        if kind == BASE:
            p.copy_(base.read(name, p.shape, 0, len(p)))
        else:  # the file's B has the scale in it
            p.copy_(values[name] / (lora.scale if name.endswith("lora_B.weight") else 1))
    merged = filled(MODEL, MODEL.stored_weights(folder))
    draws = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 1, 28, 28, generator=draws), torch.tensor([1.0, 0.4])
    cond = Condition(tokens=torch.randn(2, 3, WIDTH, generator=draws))
    close(merged(x, t, t / 3, cond), found.net(x, t, t / 3, cond))
    assert float((merged(x, t, t, cond) - found.networks[BASE](x, t, t, cond)).abs().max()) > 1e-4


def test_a_merged_network_is_one_to_start_from_and_a_lora_is_not(
    run: Tiny, made: Path, tmp_path: Path
) -> None:
    folder = export(made, weights="raw", step=8, dtype="fp32", out=tmp_path / "m", merge=True)
    words = run.words(tmp_path / "on", *LORA, f"init_from={folder}", "steps=2", "eval_every=0")
    ended = run.program.run(*words)
    assert ended.code == 0, ended.err
    words = run.words(tmp_path / "no", *LORA, f"init_from={made / 'export'}")
    refused(run.program.run(*words), "holds a LoRA", "--merge")


def test_merging_asks_for_the_base_that_was_trained_on(
    run: Tiny, made: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other_base(run, other)
    merge = partial(export, made, weights="ema", step=None, dtype="fp32", merge=True)
    with pytest.raises(UserError, match=r"is not the base .* --base") as caught:
        merge(out=tmp_path / "out", base=str(other))
    assert str(other) in str(caught.value)
    moved = tmp_path / "moved"
    shutil.copytree(run.folder / "base", moved)
    assert merge(out=tmp_path / "out", base=str(moved)) == tmp_path / "out"


def other_base(run: Tiny, folder: Path) -> None:
    """Write a base of which one number is another."""
    shutil.copytree(run.folder / "base", folder)
    path = folder / "transformer" / f"{WEIGHTS}.safetensors"
    values = load_file(path)
    values["proj_out.weight"][0, 0] += 1e-3
    save_file(values, path)


# Resuming


def test_a_run_goes_on_where_it_stopped_also_with_its_base_elsewhere(
    run: Tiny, made: Path, tmp_path: Path
) -> None:
    folder, base = tmp_path / "run", tmp_path / "base"
    words = run.words(folder, *LORA, "average.slow=0.9", "keep_last=5")
    shutil.copytree(made, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    shutil.copytree(run.folder / "base", base)
    ended = run.program.run_group(2, *words, f"init_from={base}")
    assert [one.code for one in ended] == [0, 0], ended
    assert steps(folder) == list(range(STEPS))
    assert curve(folder) == curve(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("base", "changed: init_from (sha256 "),
        ("adapter.rank=4", "changed: adapter.rank (2 -> 4)"),
        ("adapter=none", "adapter._type (LoRA -> NoAdapter)"),
    ],
)
def test_another_base_or_adapter_is_another_run(
    run: Tiny, made: Path, tmp_path: Path, change: str, said: str
) -> None:
    words = run.words(made, *LORA, "average.slow=0.9", "steps=16")
    if change == "base":
        other_base(run, tmp_path / "other")
        words.append(f"init_from={tmp_path / 'other'}")
    elif change == "adapter=none":
        words = [w for w in words if not w.startswith("adapter")]
    else:
        words.append(change)
    refused(run.program.run(*words), said)


# What is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("init_from=null",), "adapter=lora needs a pretrained base: set init_from="),
        (("average.offload=true",), "average.offload does not work with adapter=lora"),
        (("adapter.rank=0",), "adapter.rank is 0; it must be at least 1"),
        (("adapter.targets=[to_z]",), "adapter.targets: no layer that an output depends on"),
        (("adapter.targets=[attn]",), "adapter.targets: attn is transformer_blocks.0.attn"),
        (("adapter.dropout=0.1",), "unknown key 'adapter.dropout'"),
        (
            ("engine=zero3", "engine.precision=fp32", "average.bf16=true"),
            "average.bf16 with engine=zero3 needs engine.precision=bf16",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_its_key(
    run: Tiny, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    refused(run.program.run(*run.words(tmp_path / "run", *LORA, *words)), said)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_a_lora_can_be_merged(run: Tiny, tmp_path: Path) -> None:
    words = run.words(tmp_path / "run", "steps=1", "eval_every=0", "evals.images=1")
    assert run.program.run(*words).code == 0
    command = [sys.executable, "-m", "twinflow_train.export", str(tmp_path / "run"), "--merge"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "--merge is for LoRA runs" in ended.stderr


# The published runs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_set_as_they_were_published(name: str) -> None:
    found = composed(f"experiment={name}")
    assert isinstance(found.adapter, LoRA)
    assert (found.optim.lr, list(found.optim.betas), found.optim.clip) == (1e-4, [0.9, 0.99], 1.0)
    assert found.objective.rectify_weight == 0.5
    edit, first = "edit" in name, "order1" in name
    assert (found.adapter.rank, found.adapter.alpha) == (64, 32 if edit else 64)
    assert found.batch == (24 if edit else 64)
    assert found.batch % (8 * found.micro_batch) == 0
    if first:
        assert found.objective == presets.twinflow_lora_order1()
    else:
        assert (found.objective.order, found.objective.guidance) == (2, 0.8)
        assert found.objective.teacher_decay == 0.99


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_can_be_built(name: str) -> None:
    found = composed(f"experiment={name}")
    family = next(each for each in FAMILIES.values() if isinstance(found.model, type(each.small)))
    small = {key: value for key, value in vars(family.small).items() if key != "target_time"}
    model = replace(found.model, **small)
    found.adapter.check(model)
    beside = found.average.decays(found.objective.teacher_decay)
    (one,) = found.adapter.assemble(model, list(beside))
    assert {*beside, "model", BASE} == one.networks.keys()
