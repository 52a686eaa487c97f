"""Baselines through the stock pipelines of diffusers, a few-step LoRA among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig
from PIL import Image

from tests.evaluate.test_program import results, words
from tests.pipelines.qwen_image import write_pipeline
from tests.program import Program, refused, serve
from twinflow_train.errors import UserError
from twinflow_train.models.stock import StockPipeline
from twinflow_train.rng import generator

LORA = "Lightning-4steps.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as diffusers writes it, of random values."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = QwenImagePipeline.from_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.transformer.add_adapter(config)
        values = {
            name.replace(".default", ""): torch.randn_like(value)
            for name, value in pipeline.transformer.state_dict().items()
            if "lora_" in name
        }
    QwenImagePipeline.save_lora_weights(folder, values, weight_name=LORA)
    return folder / LORA


def stock(base: Path, lora: Path | None, *, steps: int = 2) -> StockPipeline:
    return StockPipeline(
        str(base), lora=str(lora) if lora else None, steps=steps, guidance=1.0, height=32,
        width=48, seed=3, device=torch.device("cpu"), dtype=None,
    )  # fmt: skip


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).float()


def test_pictures_are_those_of_the_stock_pipeline_with_its_lora(base: Path, lora: Path) -> None:
    drawn, seconds = stock(base, lora).draw(["a red apple", "text"], images=1, first=7, batch=1)
    assert seconds > 0
    pipeline = QwenImagePipeline.from_pretrained(base)
    pipeline.load_lora_weights(lora)
    draw = generator("stock", 3, 8)
    (wanted,) = pipeline(
        "text", num_inference_steps=2, true_cfg_scale=1.0, height=32, width=48, generator=draw
    ).images
    assert torch.equal(pixels(drawn[1]), pixels(wanted))
    without, _ = stock(base, None).draw(["text"], images=1, first=8, batch=1)
    assert (pixels(without[0]) - pixels(drawn[1])).abs().mean() > 1


def test_a_picture_is_a_function_of_its_number(base: Path) -> None:
    pipeline = stock(base, None, steps=1)
    drawn, _ = pipeline.draw(["a", "b"], images=2, first=0, batch=3)
    again, _ = pipeline.draw(["b"], images=2, first=2, batch=1)
    for one, other in zip(drawn[2:], again, strict=True):
        assert (pixels(one) - pixels(other)).abs().max() <= 1
    assert (pixels(drawn[0]) - pixels(drawn[1])).abs().mean() > 1


def test_what_is_no_lora_of_the_pipeline_is_one_clear_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"baseline\.lora: QwenImagePipeline cannot load"):
        stock(base, tmp_path / "torn.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"baseline\.pipeline: .* cannot be loaded"):
        stock(tmp_path, None)


def test_everybody_stands_in_one_table(
    base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    scratch = tmp_path_factory.mktemp("evaluate")
    program: Program = serve(scratch=scratch, cwd=scratch, server="tests.evaluate.server")
    other = write_pipeline(tmp_path / "rcgm")
    more = [f"compare={base}", "base.steps=2", f"also=[{other}]", f"baseline.pipeline={base}",
            f"baseline.lora={lora}", "baseline.steps=3", "suite.limit=2", "nfe=[1]"]  # fmt: skip
    ended = program.run(*words(base, tmp_path / "out", *more))
    assert (ended.code, ended.errors) == (0, [])
    rows = [(r["model"], r["nfe"], r["style"], r["guidance"]) for r in results(tmp_path / "out")]
    assert rows == [
        ("tiny", 1, "few", 1.0),
        ("rcgm", 1, "few", 1.0),
        ("base", 4, "multi", 4.0),
        ("Lightning-4steps", 3, "stock", 1.0),
    ]
    again = [f"also=[{base}]"]
    refused(program.run(*words(base, tmp_path / "twice", *again)), "two models are called tiny")
