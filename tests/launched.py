"""What launch/torchrun.sh starts in the trainer's place: it ends in each of the trainer's ways."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

SAVED = 75


def main(end: str, folder: Path) -> int:
    """End as asked. Every start leaves an empty file begun-NUMBER-RANK in the folder, and
    start-NUMBER-RANK as soon as it listens to signals.
    """
    rank, number = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    asked: list[int] = []
    (folder / f"begun-{number}-{rank}").touch()
    if end == "save late":
        time.sleep(1.5)  # it imports, and does not listen
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(one, lambda number, frame: asked.append(number))
    (folder / f"start-{number}-{rank}").touch()
    match end:
        case "fail":
            return 1
        case "fail once":
            return int(number == 0)
        case "refuse":
            return 2
        case "refuse alone":
            return 2 if rank == 0 else wait(lambda: False)
        case "end when asked":
            wait(lambda: bool(asked))
        case "save" | "save late":
            wait(lambda: bool(asked))
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the trainer does
            return SAVED
        case "hang":
            wait(lambda: asked.count(signal.SIGINT) > 1)
        case _:
            (folder / f"words-{rank}").write_text("\n".join(sys.argv[3:]))
    return 0


def wait(true: object) -> int:
    """Wait until something holds, for two minutes at most."""
    assert callable(true)
    deadline = time.monotonic() + 120
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
