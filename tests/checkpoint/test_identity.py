"""What a checkpoint of an older program does not say of its run yet has its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tools import IDENTITY, Plainly
from twinflow_train.errors import UserError

NEW = {"target_time": "embedder"}


def identity(**model: str) -> dict[str, Any]:
    return IDENTITY | {"model": IDENTITY["model"] | model}


def test_a_key_that_came_later_has_its_default(tmp_path: Path) -> None:
    assert not NEW.keys() & IDENTITY["model"].keys()
    Plainly.open(tmp_path).save(1)
    ours = Plainly.open(tmp_path, identity=identity(**NEW), defaults={"model": NEW})
    assert ours.saves.resume(must=True)
    other = Plainly.open(tmp_path, identity=identity(target_time="shift"), defaults={"model": NEW})
    with pytest.raises(UserError, match=r"model\.target_time \(embedder -> shift\)"):
        other.saves.resume()


def test_a_key_that_went_is_as_if_it_had_its_default(tmp_path: Path) -> None:
    Plainly.open(tmp_path, identity=identity(**NEW)).save(1)
    assert Plainly.open(tmp_path, defaults={"model": NEW}).saves.resume(must=True)
    with pytest.raises(UserError, match=r"model\.target_time"):
        Plainly.open(tmp_path).saves.resume()
