"""Programs as their users meet them: real processes, command lines and exit codes.

They are forks of a server that has imported everything, so that a start takes a tenth of a second
instead of seven seconds.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch.distributed import TCPStore

from tests.forking import Forked, Server, await_file, fork_on_request

MODULE = "twinflow_train.train"
_RATE = re.compile(r"[\d?](step|sample|item)/s\b|[\d?]s/(step|sample|item)\b")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What is left of a process: its exit code (minus the signal that killed it) and its words."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Return the lines on stderr that are not a progress bar's, fast ("step/s") or slow."""
        lines = self.err.replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip() and not _RATE.search(line)]


def refused(ended: Ended, *words: str) -> None:
    """Hold that a process ended with exit code 2 and one line that says these words."""
    assert ended.code == 2, (ended.code, ended.err)
    assert len(ended.errors) == 1, ended.err
    assert ended.errors[0].startswith("error: ")
    for word in words:
        assert word in ended.errors[0]


@dataclass(frozen=True, kw_only=True)
class Running(Forked):
    """A process that was started."""

    def wait(self, timeout_seconds: float = 180) -> Ended:
        """Wait for the end; a process that does not come to it is killed, and fails the test."""
        try:
            code = int(await_file(self.folder / "code", timeout_seconds))
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise
        # A process that was killed at its very start has opened neither file.
        said = (self.folder / name for name in ("out", "err"))
        out, err = (path.read_text() if path.exists() else "" for path in said)
        return Ended(code=code, out=out, err=err)


class Program:
    """Starts the program in `cwd`; its processes' files stand in `scratch`."""

    def __init__(self, server: Server, *, scratch: Path, cwd: Path) -> None:
        self._server, self._scratch, self._cwd = server, scratch, cwd
        self._numbers = count()

    def start(self, *words: str, env: Mapping[str, str] | None = None) -> Running:
        """Start one process with a command line."""
        folder = self._scratch / f"{next(self._numbers):04d}"
        self._server.fork(folder, words=words, env=dict(env or {}), cwd=str(self._cwd))
        return Running(folder=folder)

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> Ended:
        """Run one process to its end."""
        return self.start(*words, env=env).wait()

    @contextmanager
    def group(self, ranks: int, *words: str) -> Iterator[list[Running]]:
        """Start a process for each rank, with the environment that torchrun gives."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        processes = [
            self.start(*words, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.send(signal.SIGKILL)

    def run_group(self, ranks: int, *words: str) -> list[Ended]:
        """Run a process for each rank to their ends."""
        with self.group(ranks, *words) as processes:
            return [process.wait() for process in processes]


def serve(*, scratch: Path, cwd: Path, server: str = "tests.program") -> Program:
    """Start a server of programs: a module that forks itself into `become`."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in torchrun}
    return Program(Server(server, env=inherited | quiet), scratch=scratch, cwd=cwd)


def become(
    *, folder: str, words: Sequence[str], env: dict[str, str], cwd: str, module: str = MODULE
) -> None:
    """Be `python -m module words...`."""
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Whatever is slow to import; no thread may have started before a fork.
    for name in (
        "diffusers.models.transformers.transformer_qwenimage",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "twinflow_train.loop",
    ):
        importlib.import_module(name)
    fork_on_request(become)
