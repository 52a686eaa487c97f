"""What DeepSpeed has to be told before ZeRO-3 works as we want it to."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from twinflow_train.dist import World


def cutter() -> Any:
    """Give DeepSpeed's class that cuts a module, but not for sending rank 0's tensors to all.

    They are empty, and what is received would fill memory that is only reserved.
    """
    import deepspeed

    class Cutter(deepspeed.zero.Init):  # type: ignore[misc]  # it has no types
        def _zero_init_param(self, parameter: Any) -> None:
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    return Cutter


def join(world: World) -> None:
    """Have DeepSpeed use the process group that there is, and say nothing."""
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))  # it insists on a launcher
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # a guess would be talked about
    import deepspeed
    from deepspeed.utils import groups

    if world.device.type == "cpu":
        # It would compile collectives in shared memory, for a minute, where it finds that it can.
        # gloo's do, so here nothing can be compiled.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)  # of what fails, we tell
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_init_required=False)
    # It would go on with copies of the group of an earlier run in this process.
    groups._release_process_group_references()


def settle(world: World) -> None:
    """Wait until changed shards are written: ZeRO-3 gathers on a stream that waits for no other."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
