"""Real digits and a judge trained on them, made once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.evals import digits
from twinflow_train.data.shards import ShardSet
from twinflow_train.evals.judge import fit_judge


@dataclass(frozen=True)
class Real:
    """Training and held-out sets, a judge's file, its accuracy and how long it took."""

    train: ShardSet
    heldout: ShardSet
    judge: Path
    accuracy: float
    seconds: float


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("digits")
    train = digits.write(folder / "train", slice(1, None, 2))
    heldout = digits.write(folder / "heldout", slice(0, None, 10))
    began = time.perf_counter()
    accuracy = fit_judge(train=train, heldout=heldout, path=folder / "judge.safetensors")
    seconds = time.perf_counter() - began
    return Real(train, heldout, folder / "judge.safetensors", accuracy, seconds)
