"""Loading wastes nothing: a rank reads its own part, and at no moment holds much more."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.engines.tools import fsdp2
from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.models import base
from twinflow_train.models.qwen_image import QwenImage

SIZE = QwenImage(layers=13, heads=16, head_dim=64, text_width=1024, rope=[16, 24, 24])
RANKS, ALLOWED = 4, 1.3


class Resident(threading.Thread):
    """Watches how much memory this process has, file mappings included."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begun = self.peak = self.now()
        self.done = threading.Event()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def run(self) -> None:
        while not self.done.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def load(world: World, folder: str | None) -> tuple[int, int]:
    """Build and fill one network; return the most that it took, and its bytes."""
    weights = SIZE.random_weights(1) if folder is None else SIZE.stored_weights(Path(folder))
    engine: FSDP2 = fsdp2()
    mesh = engine._mesh(world)
    SIZE.build()  # imports the library, which has a size of its own
    resident = Resident()
    resident.start()
    net = engine._network(SIZE, weights, mesh, offload=False)
    resident.done.set()
    resident.join()
    total = sum(p.numel() * p.element_size() for p in net.parameters())
    return resident.peak - resident.begun, total


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the 2 GB of weights as several files with an index."""
    folder = tmp_path_factory.mktemp("weights")
    net, values = SIZE.build(), SIZE.random_weights(1)
    tensors = (
        (net.stored_name(name), values.read(net.stored_name(name), p.shape, 0, len(p)))
        for name, p in net.named_parameters()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SHARD_BYTES", 700 * 2**20)
        base.save_folder(folder / "transformer", SIZE.config(), tensors)
    return folder


def test_a_node_holds_hardly_more_than_the_model_while_it_loads(stored: Path) -> None:
    parts = sorted(path.name for path in (stored / "transformer").glob("*.safetensors"))
    assert len(parts) == 3
    found = spawn(load, RANKS, str(stored), timeout_seconds=300)
    total = found[0][1]
    assert total == pytest.approx(2e9, rel=0.05)
    assert sum(peak for peak, _ in found) < ALLOWED * total
    assert sum(peak for peak, _ in found) > 0.9 * total  # or this measures nothing


def test_random_weights_are_made_as_sparingly() -> None:
    found = spawn(load, RANKS, None, timeout_seconds=300)
    assert sum(peak for peak, _ in found) < ALLOWED * found[0][1]
