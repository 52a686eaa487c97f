"""What a process of `tests.helpers.spawn` does: its own environment first, imports after.

Nothing of the package may be imported at the top: whether types are checked is decided before.
"""

from __future__ import annotations

import os
import pickle
import traceback
from pathlib import Path

import torch


def rank(folder: Path, env: dict[str, str], task: bytes) -> None:
    """Be one rank: run the pickled (function, args); write the result, or what went wrong."""
    os.environ.clear()
    os.environ.update(env)
    import tests.typing_hook  # noqa: F401
    from twinflow_train import dist

    torch.set_num_threads(1)
    function, args = pickle.loads(task)  # noqa: S301 - our own, a moment old
    number = env["RANK"]
    with dist.start() as world:
        # Caught before the group is left: once this rank is gone the others fail too, later.
        try:
            result = function(world, *args)
        except BaseException:
            partial = folder / f"{number}.partial"
            partial.write_text(traceback.format_exc())
            partial.rename(folder / f"{number}.error")
            raise
        torch.save(result, folder / f"{number}.pt")
