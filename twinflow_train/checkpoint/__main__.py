"""Look at checkpoints: `python -m twinflow_train.checkpoint inspect|verify PATH [...]`.

PATH is a checkpoint's folder, a folder of them, a run's folder, or a URL of one of these. Exit
code 0: whole; 1: damaged; 2: no checkpoint there.
"""

from __future__ import annotations

import argparse
import sys

from twinflow_train.checkpoint.inspecting import find, look
from twinflow_train.errors import UserError


def main(paths: list[str], *, bytewise: bool) -> int:
    """Print what is found at each path; return the exit code."""
    damaged = False
    for path in paths:
        for place in find(path):
            finding = look(place, bytewise=bytewise)
            print(finding.text)
            damaged = damaged or bool(finding.fault)
    return int(damaged)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m twinflow_train.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("inspect", "verify"), help="verify reads every byte")
    parser.add_argument("paths", nargs="+", metavar="PATH")
    words = parser.parse_args()
    try:
        sys.exit(main(words.paths, bytewise=words.verb == "verify"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
