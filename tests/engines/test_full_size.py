"""Every released network is cut over 8 and 64 ranks at its full size, and trains there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from twinflow_train.run import GROUPS

ROOT = Path(__file__).parent.parent.parent
MEBI = 2**20
KNOWN = {"qwen_image": 20.44e9, "z_image": 6.155e9, "sana_1.6b": 1.640e9, "sana_0.6b": 0.601e9}
"""Parameters of the released networks, with the second time embedder."""


@cache
def dry(ranks: int) -> dict[str, dict[str, int]]:
    """Run the dry run; its process holds at most 3 GiB, where Qwen-Image alone would take 76."""
    code = (
        "import resource, sys\n"
        "from tests.engines.dry import main\n"
        f"main({ranks})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    said, kibi = ended.stdout.splitlines()[-2:]
    assert int(kibi) < 3 * MEBI, "memory was touched"
    found: dict[str, dict[str, int]] = json.loads(said)
    return found


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("name", GROUPS["model"])
def test_a_rank_holds_its_share(name: str, ranks: int) -> None:
    found = dry(ranks)[name]
    if name in KNOWN:
        assert found["whole"] == pytest.approx(KNOWN[name], rel=1e-3)
    share = found["whole"] / ranks
    assert share <= found["here"] < 1.03 * share  # rank 0 has the larger part of what is odd
    assert found["without_gradient"] == 0
