"""What a run saved becomes a diffusers folder, without the ranks that wrote it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file

from tests.pipelines.qwen_image import write_pipeline
from tests.tiny import Tiny, tiny
from twinflow_train.errors import UserError
from twinflow_train.export import export
from twinflow_train.flow.sampler import FEW
from twinflow_train.models.qwen_image import QwenImage
from twinflow_train.models.two_times import TargetTime
from twinflow_train.models.weights import WEIGHTS
from twinflow_train.reporting import card
from twinflow_train.run import model_of
from twinflow_train.sampling.origin import find

SECOND = "time_text_embed_2."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def made(run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny run on two ranks, with a second average."""
    folder = tmp_path_factory.mktemp("export") / "run"
    words = run.words(folder, "average.slow=0.9", "keep_last=5", "eval_every=0")
    assert [ended.code for ended in run.program.run_group(2, *words)] == [0, 0]
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / f"{WEIGHTS}.safetensors")


def test_the_newest_checkpoint_gives_what_the_run_exported(made: Path, tmp_path: Path) -> None:
    out = export(made, weights=None, step=None, dtype="fp32", out=tmp_path / "out")
    ours, theirs = weights(out), weights(made / "export")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in (card.CARD, card.SETTINGS):
        assert (out / name).read_text() == (made / "export" / name).read_text()


def test_other_weights_and_steps_are_other_numbers(made: Path) -> None:
    found = {
        (name, step): weights(export(made, weights=name, step=step, dtype="fp32", out=None))
        for name, step in (("raw", None), ("slow", None), ("ema", None), ("raw", 4))
    }
    assert (made / "export-00000004-raw").is_dir()
    proj = [tensors["proj_out.weight"] for tensors in found.values()]
    assert all(not torch.equal(proj[i], proj[j]) for i in range(4) for j in range(i))


def test_diffusers_opens_the_folder_and_bfloat16_is_a_rounding(made: Path, tmp_path: Path) -> None:
    out = export(made, weights="ema", step=None, dtype="bf16", out=tmp_path / "out")
    half, whole = weights(out), weights(made / "export")
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    stock = QwenImageTransformer2DModel.from_pretrained(out / "transformer")
    plain = {name: p for name, p in half.items() if not name.startswith(SECOND)}
    assert {name for name, _ in stock.named_parameters()} == set(plain)
    assert len(half) > len(plain)


def test_a_whole_pipeline_loads_in_plain_diffusers_and_in_ours(made: Path, tmp_path: Path) -> None:
    tiny = write_pipeline(tmp_path / "tiny")
    out = tmp_path / "out"
    for _ in range(2):  # also over what is there
        export(made, weights=None, step=None, dtype="fp32", out=out, pipeline=str(tiny))
    parts = {path.name for path in tiny.iterdir()}
    assert parts <= {path.name for path in out.iterdir()}
    assert weights(out).keys() == weights(made / "export").keys()
    assert (out / card.CARD).is_file()
    stock = QwenImagePipeline.from_pretrained(out)
    assert stock.transformer.config.num_layers == 1
    assert torch.equal(stock.transformer.proj_out.weight, weights(out)["proj_out.weight"])
    found = find(str(out))
    assert found.encoders.path == str(out)
    assert found.samplers == tuple(FEW.values())
    with pytest.raises(UserError, match=r"--pipeline: .*nowhere is no diffusers pipeline"):
        export(
            made, weights=None, step=None, dtype="fp32", out=out, pipeline=str(tmp_path / "nowhere")
        )
    index = tiny / "model_index.json"
    for old, new in (("QwenImagePipeline", "SanaPipeline"), ("QwenImageTransformer2D", "Sana")):
        text = index.read_text()
        index.unlink()  # or the linked one would change with it
        index.write_text(text.replace(old, new))
        other = tmp_path / "other"
        with pytest.raises(UserError, match="give the pipeline of their base"):
            export(made, weights=None, step=None, dtype="fp32", out=other, pipeline=str(tiny))
        assert not other.exists()
        index.write_text(text)


def test_the_card_is_made_of_what_the_run_says(made: Path) -> None:
    said = (made / "export" / card.CARD).read_text()
    assert "averaged weights after 12 steps on 96 samples" in said
    assert "licence of the data: test" in said
    assert "| ema" in said
    assert "| slow" not in said
    later = export(made, weights="raw", step=8, dtype="fp32", out=None)
    assert "Results" not in (later / card.CARD).read_text()


def test_what_is_not_there_is_one_line(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twinflow_train.export"]
    for words, told in {
        (str(tmp_path),): "give a run's folder",
        (str(made), "--step", "5"): "no checkpoint of step 5; there are: 4, 8, 12",
    }.items():
        ended = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert told in ended.stderr


def test_a_damaged_checkpoint_is_refused(made: Path, tmp_path: Path) -> None:
    (file,) = (made / "checkpoints" / "step-00000004").glob("rank-00000.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    try:
        with pytest.raises(UserError, match=r"rank-00000"):
            export(made, weights="raw", step=4, dtype="fp32", out=tmp_path / "out")
        assert not (tmp_path / "out" / "transformer").exists()
    finally:
        file.write_bytes(whole)


def test_a_model_is_made_again_from_its_plain_configuration() -> None:
    config = {"_type": "QwenImage", "layers": 3, "target_time": "shift"}
    assert model_of(config) == QwenImage(layers=3, target_time=TargetTime.shift)
    with pytest.raises(UserError, match="model Nope is not one"):
        model_of({"_type": "Nope"})
