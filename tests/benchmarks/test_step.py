"""The benchmark of steps: its operations at the lengths it states, and that it ends."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.step import KEEPING, ROWS, TEXTS, main, model, operations, ours, published, stock
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.objectives.presets import flow_matching
from twinflow_train.objectives.twinflow import TwinFlow

SIDE = 32
"""Of latents: 256 image tokens."""


def counted(world: World) -> dict[str, float]:
    """Count the operations of ours over those of the others, at the sizes of the benchmark."""
    size, found = model(64), {}
    for name, lengths in TEXTS.items():
        step = ours(size, TwinFlow(), lengths, SIDE, world, ROWS[name])
        found[name] = operations(step) / operations(published(size, lengths, SIDE, max(lengths)))
    plain, short = replace(flow_matching(), teacher_decay=0.0), TEXTS["short"]
    step = ours(size, plain, short, SIDE, world, ROWS["flow_matching"])
    found["flow_matching"] = operations(step) / operations(stock(size, short, SIDE))
    return found


def test_ours_needs_fewer_operations() -> None:
    (found,) = spawn(counted, 1)
    assert found["short"] <= 0.75
    assert found["long"] <= 0.40
    assert found["flow_matching"] <= 1.01  # and the second embedder


def test_it_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEEPING.items():
        monkeypatch.setenv(name, value)
    out, threads = tmp_path / "step.json", torch.get_num_threads()
    sizes = ["--width=32", "--side=8", "--rounds=1", "--scale=0.1"]
    main([*sizes, f"--out={out}"])
    found = json.loads(out.read_text())
    assert found["about"]["threads"] == threads
    for name in (*TEXTS, "flow_matching"):
        assert found[name]["ratio"]["time"] > 0
    assert "| long |" in capsys.readouterr().out


def test_it_starts_anew_with_an_allocator_that_keeps_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[dict[str, str]] = []

    class Begun(Exception):
        """The program would be another one from here."""

    def execve(path: str, words: list[str], env: dict[str, str]) -> None:
        began.append(env)
        raise Begun

    for name in KEEPING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(Begun):
        main(["--rounds=1", f"--out={tmp_path / 'step.json'}"])
    assert KEEPING.items() <= began[0].items()
