"""The processes of `tests.helpers.spawn`: their own environment first, imports after.

Nothing of the package may be imported at the top: whether types are checked is decided before.
"""

from __future__ import annotations

import importlib
import os
import pickle
import traceback
from pathlib import Path

import torch

from tests.forking import fork_on_request, put

TASK, ERROR, RESULT = "task", "error", "result"
"""Files: the task stands above the ranks' folders, what came of it in them."""


def rank(*, folder: str) -> None:
    """Be the rank that the folder is named for: run the task; write its result, or its error."""
    own = Path(folder)
    env, cwd, task = pickle.loads((own.parent / TASK).read_bytes())  # noqa: S301 - our own
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env | {"RANK": own.name, "LOCAL_RANK": own.name})
    importlib.import_module("tests.typing_hook")
    from twinflow_train import dist

    torch.set_num_threads(1)
    function, args = pickle.loads(task)  # noqa: S301 - our own
    with dist.start() as world:
        # Caught before the group is left: once this rank is gone the others fail too, later.
        try:
            result = function(world, *args)
        except BaseException:
            put(own / ERROR, traceback.format_exc())
            raise
        torch.save(result, own / RESULT)


if __name__ == "__main__":
    # Whatever is slow to import; no thread may have started before a fork.
    for name in ("torch.distributed.fsdp", "torch.distributed.tensor"):
        importlib.import_module(name)
    fork_on_request(rank)
