"""What launch/submit.sh runs: would this configuration start, on so many ranks?"""

from __future__ import annotations

import sys

import torch

from twinflow_train.dist import World
from twinflow_train.launch import launch
from twinflow_train.run import Run


def main() -> None:
    """Compose the run of the words after `--`; exit with 2 and one line where it would not start.

    Opens the shards and reads their index, starts no process group, writes nothing.
    """
    words = sys.argv[1:]
    if len(words) < 3 or words[0] != "--ranks" or words[2] != "--":
        sys.exit("usage: python -m launch.check --ranks N -- [OVERRIDES...]")
    ranks, sys.argv[1:] = int(words[1]), words[3:]

    def check(run: Run) -> int:
        run.checkpoints = None  # whether their place can be used, all ranks ask together
        run.check(World(rank=0, size=ranks, device=torch.device("cpu")))
        return 0

    launch(check)


if __name__ == "__main__":
    main()
