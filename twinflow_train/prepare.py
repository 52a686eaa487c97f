"""Prepare: `python -m twinflow_train.prepare source.path=PICTURES folder=OUT` makes shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.config_store import ConfigStore

from twinflow_train import run
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.folder import Folder
from twinflow_train.encoding.generated import Generated
from twinflow_train.encoding.images import NoImages, Stored
from twinflow_train.encoding.job import jobs
from twinflow_train.encoding.parquet import Parquet
from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.summary import lines
from twinflow_train.encoding.tars import WebDataset
from twinflow_train.encoding.workers import Worker
from twinflow_train.launch import launch
from twinflow_train.models import families

GROUPS: Mapping[str, Mapping[str, Any]] = {
    "source": {
        "folder": Folder(),
        "parquet": Parquet(),
        "webdataset": WebDataset(),
        "captions": Captions(),
    },
    "images": {"stored": Stored(), "none": NoImages(), "generated": Generated()},
    "encoders": families.OPTIONS,
    "model": run.GROUPS["model"],
}
"""Every option of every group; its defaults are the instance's values."""


def register() -> None:
    """Tell Hydra the groups."""
    store = ConfigStore.instance()
    store.store(name="preparation", node=Preparation)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)


def prepare(settings: Preparation) -> int:
    """Do this worker's part and say what was done."""
    for job in jobs(settings, Worker.here()):
        print("\n".join(lines(job.run(), job.settings, job.worker)), flush=True)
    return 0


if __name__ == "__main__":
    launch(prepare, config="prepare", register=register)
