"""Plan: `python -m twinflow_train.plan experiment=qwen_image_full gpus=8 gpu=h100_80gb`.

It needs neither data nor weights nor a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from twinflow_train import run
from twinflow_train.launch import launch
from twinflow_train.planner.gpus import GPUS, Kind
from twinflow_train.planner.memory import latent_side
from twinflow_train.planner.plan import plan, remedies
from twinflow_train.planner.report import lines
from twinflow_train.planner.start import job_of
from twinflow_train.run import Run


@dataclass(kw_only=True)
class Planned(Run):
    """A run that is planned.

    gpus: GPUs of the job; gpu: their kind. nodes: that they are spread over; 0 is one for every
    eight. price_per_hour: of one GPU; 0 leaves costs out. For the others see `Run`.
    """

    gpus: int = 8
    gpu: Kind = Kind.h100_80gb  # type: ignore[attr-defined]
    nodes: int = 0
    price_per_hour: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, right, wanted in self._plan_rules():
            if not right:
                raise ValueError(f"{key} must be {wanted}, got {vars(self)[key]}")

    def _plan_rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "gpus", self.gpus >= 1, "1 or more"
        yield "nodes", 0 <= self.nodes <= self.gpus, "0 (one for every 8 GPUs) to gpus"
        yield "price_per_hour", self.price_per_hour >= 0, "0 or more"

    @property
    def per_node(self) -> int:
        """GPUs of a node."""
        return -(-self.gpus // self.nodes) if self.nodes else min(8, self.gpus)


def register() -> None:
    """Tell Hydra the groups."""
    run.register()
    ConfigStore.instance().store(name="planned", node=Planned)


def main(planned: Planned) -> int:
    """Print the plan; return 0 if it fits and 1 if not."""
    planned.engine.check(planned, ranks=planned.gpus)
    planned.adapter.check(planned.model)
    side = latent_side(planned.model, planned.plan.pixels)
    job = job_of(
        planned,
        ranks=planned.gpus,
        latent=(side, side),
        text=planned.plan.tokens,
        references=planned.plan.references,
    )
    gpu = GPUS[planned.gpu.value]
    found = plan(job, gpu, per_node=planned.per_node)
    ways = [] if found.fits else remedies(job, gpu.memory)
    said = lines(found, steps=planned.steps, price_per_hour=planned.price_per_hour, remedies=ways)
    print("\n".join(said), flush=True)
    return 0 if found.fits else 1


if __name__ == "__main__":
    launch(main, config="plan", register=register)
