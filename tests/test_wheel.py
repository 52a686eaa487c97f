"""A built wheel, installed elsewhere, finds its configuration and trains from another folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.writing import write_shards
from twinflow_train.rng import generator

TOP = Path(__file__).parent.parent
LOSS = "loss/total"


def run(*command: str, cwd: Path, **env: str) -> str:
    """Run a command outside the repository; return what it printed."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=inherited | env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it, alone, into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    run(*pip, *build, str(TOP), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    run(*pip, "install", "--no-deps", "--target", str(target), str(wheel), cwd=folder)
    return target


def test_the_wheel_carries_the_configuration(installed: Path) -> None:
    assert (installed / "twinflow_train" / "conf" / "train.yaml").is_file()
    shipped = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert shipped == {"twinflow_train"}


def train(installed: Path, cwd: Path, *overrides: str) -> str:
    """Run the trainer; -P keeps all but the wheel's folder off the path."""
    command = (sys.executable, "-P", "-m", "twinflow_train.train", *overrides)
    return run(*command, cwd=cwd, PYTHONPATH=str(installed))


def test_an_installed_wheel_shows_its_configuration(installed: Path, tmp_path: Path) -> None:
    text = train(installed, tmp_path, "experiment=digits_flow", "--cfg", "job")
    assert "seed:" in text
    assert "steps:" in text


def test_an_installed_wheel_trains_from_another_folder(installed: Path, tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        write_digits(tmp_path / name)
    train(
        installed,
        tmp_path,
        *("experiment=digits_flow", "evals=none", "tracking=none", "steps=2", "log_every=1"),
        *("data.path=train", "data.heldout=heldout", "batch=4", "micro_batch=4", "folder=out"),
        *("model.layers=1", "model.heads=1"),
    )
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = {line["step"]: line[LOSS] for line in map(json.loads, lines) if LOSS in line}
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses.values())


def write_digits(folder: Path) -> None:
    """Write eight samples in the form of the digits set, of noise."""
    numbers = generator("wheel")
    samples = [
        Sample(
            key=f"s{i}",
            latent=torch.randn(1, 28, 28, generator=numbers),
            texts=[torch.randn(3, 384, generator=numbers)],
            captions=["noise"],
            fields={"label": i},
        )
        for i in range(8)
    ]
    about = About(encoder="none", revision="0", null_prompt="", licence="free")
    write_shards(folder, samples, null=torch.zeros(1, 384), about=about)
