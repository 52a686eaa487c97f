"""Preparations small enough for tests, by the real encoders of a tiny pipeline."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.qwen_image import SIZE, write_pipeline
from twinflow_train.encoding.images import Stored
from twinflow_train.encoding.job import Outcome, jobs
from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.workers import Worker
from twinflow_train.models.qwen_codec import QwenImageCodec, QwenImageEncoders

CPU = torch.device("cpu")


@cache
def _pipeline(folder: Path) -> Path:
    return write_pipeline(folder)


def pipeline(factory: pytest.TempPathFactory) -> Path:
    """Return the tiny pipeline's folder, built once a session."""
    return _pipeline(factory.getbasetemp() / "tiny-pipeline")


@cache
def codec(folder: Path) -> QwenImageCodec:
    """Open the tiny pipeline's codec, once a session."""
    encoders = QwenImageEncoders(path=str(folder))
    return encoders.open(encoders.find(), CPU)


def settings(folder: Path, pipeline: Path, **changes: Any) -> Preparation:
    """Return a small preparation into `folder`."""
    small: dict[str, Any] = {
        "images": Stored(side=64),
        "encoders": QwenImageEncoders(path=str(pipeline)),
        "model": SIZE,
        "samples_per_shard": 3,
        "batch": 2,
        "loaders": 2,
    }
    return Preparation(folder=str(folder), **(small | changes))


def run(settings: Preparation, number: int = 0, count: int = 1) -> Outcome:
    """Do the part of worker `number` of `count`, in this process, in the one set that is made."""
    (only,) = jobs(settings, Worker(number=number, count=count, device=CPU, speaks=False))
    return only.run()


def skipped(folder: Path) -> dict[str, str]:
    """Read what was left out of a set, and why."""
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return {said["item"]: said["reason"] for said in map(json.loads, lines)}
