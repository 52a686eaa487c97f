"""Reads the recorded runs: their configurations, arrays and weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
CASES: dict[str, list[dict[str, Any]]] = json.loads((HERE / "cases.json").read_text())


@cache
def arrays() -> dict[str, np.ndarray]:
    """Return every array by its key."""
    with np.load(HERE / "golden.npz", allow_pickle=False) as file:
        return dict(file)


def tensor(key: str) -> Tensor:
    """Return a copy of one array."""
    return torch.tensor(arrays()[key])


def tensors(prefix: str) -> dict[str, Tensor]:
    """Return the arrays under `prefix`, such as "default/student/", without it."""
    return {k.removeprefix(prefix): tensor(k) for k in arrays() if k.startswith(prefix)}
