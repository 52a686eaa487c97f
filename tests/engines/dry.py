"""Released networks on rank 0 of many ranks, without their memory and without other processes.

`python -m tests.engines.dry RANKS` prints, as JSON, what each option of `model` means for a rank.
The process group is fake and answers at once. At full depth a network is cut and never filled, so
that no page of its memory is touched; a training pass is taken with few of its blocks, by tensors
that have shapes and no numbers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import init_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from twinflow_train.batch import Condition
from twinflow_train.dist import World
from twinflow_train.engines.average import Averages
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.optim import AdamW
from twinflow_train.models.adapter import NoAdapter
from twinflow_train.models.base import Model
from twinflow_train.models.qwen_image_edit import QwenImageEdit
from twinflow_train.models.sd3 import SD3
from twinflow_train.run import GROUPS

SIDE, TOKENS = 32, 64


class Zeros:
    """Weights of which only the shapes matter."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, *shape[1:])


@dataclass(kw_only=True)
class Dry(FSDP2):
    """FSDP2 on ranks that were arranged before tensors became fake."""

    mesh: Any = None

    def _mesh(self, world: World) -> DeviceMesh:
        found: DeviceMesh = self.mesh or super()._mesh(world)
        return found


def condition(model: Model) -> Condition:
    """Give a condition of one row, as the family wants it."""
    pooled = torch.zeros(1, model.pooled_width) if isinstance(model, SD3) else None
    picture = torch.zeros(1, model.channels, SIDE, SIDE)
    references = (picture,) if isinstance(model, QwenImageEdit) else ()
    tokens = torch.zeros(1, TOKENS, model.text_width)
    return Condition(tokens=tokens, pooled=pooled, references=references)


def held(model: Model, mesh: DeviceMesh) -> dict[str, int]:
    """Cut a whole network as the engine does; count parameters, in all and of this rank."""
    (assembly,) = NoAdapter().assemble(model, [])
    FSDP2()._shard(assembly, mesh, Averages())
    shards = [parameter for _, _, parameter in assembly.tensors()]
    assert all(isinstance(shard, DTensor) for shard in shards)
    return {
        "whole": sum(shard.numel() for shard in shards),
        "here": sum(shard.to_local().numel() for shard in shards),  # type: ignore[attr-defined]
    }


def trained(model: Model, world: World, mesh: DeviceMesh) -> int:
    """Take a pass forward and back of an engine; return how many parameters have no gradient."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Dry(mesh=mesh).shard(
            model,
            Zeros(),
            adapter=NoAdapter(),
            optim=AdamW(),
            decay=0.0,
            average=Averages(),
            world=world,
        )
        x, t = torch.zeros(1, model.channels, SIDE, SIDE), torch.ones(1)
        velocity = engine.student(x, t, 0 * t, condition(model))
        assert velocity.shape == x.shape, (velocity.shape, x.shape)
        engine.backward(velocity.square().mean(), last=True)
        return sum(p.grad is None for p in engine._trained)


def main(ranks: int) -> None:
    """Print what rank 0 of so many holds of every option of `model`."""
    init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    world = World(rank=0, size=ranks, device=torch.device("cpu"))
    mesh = FSDP2()._mesh(world)
    found = {}
    for name, model in GROUPS["model"].items():
        few = {key: 1 for key in ("layers", "dual", "refiner_layers") if key in vars(model)}
        short = replace(model, **few)
        found[name] = held(model, mesh) | {"without_gradient": trained(short, world, mesh)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
