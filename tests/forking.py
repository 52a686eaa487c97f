"""Real processes at the price of a fork: a server that has imported what is slow forks itself.

What became of a process stands in its folder: `pid`, then `code`, its exit code or minus the signal
that killed it. So nobody waits for another process but by looking there, and up to a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Forked:
    """A process that was asked for; what is told of it stands in `folder`."""

    folder: Path

    @property
    def began(self) -> bool:
        """Tell whether it has been started."""
        return (self.folder / "pid").exists()

    @property
    def pid(self) -> int:
        """Wait for the process to begin, and return its id."""
        return int(await_file(self.folder / "pid", 60))

    @property
    def code(self) -> int | None:
        """Return its exit code, None before its end."""
        path = self.folder / "code"
        return int(path.read_text()) if path.exists() else None

    @property
    def alive(self) -> bool:
        """Tell whether it has not ended."""
        return self.code is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still lives."""
        if self.alive:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


class Server:
    """A process that forks itself on request; with this process it ends, and all that it forked."""

    def __init__(self, module: str, *, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            text=True,
            cwd=TOP,
            env=dict(env),
            process_group=0,
        )

    @property
    def alive(self) -> bool:
        """Tell whether it has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Return its process id, which is also that of the group of all that it forked."""
        return self._process.pid

    def fork(self, folder: Path, **request: Any) -> None:
        """Ask for a process that does what the module makes of the request; makes its folder."""
        folder.mkdir()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request | {"folder": str(folder)}) + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Kill it, and all that it forked."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def fork_on_request(become: Callable[..., None]) -> None:
    """Be a server: for every request on stdin fork a keeper, and that a process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            _keep(become, json.loads(line))
    os.killpg(0, signal.SIGKILL)


def _keep(become: Callable[..., None], request: dict[str, Any]) -> None:
    """Fork the process, and tell that it began and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        _run(become, request)
    put(Path(request["folder"], "pid"), str(pid))
    _, status = os.waitpid(pid, 0)
    put(Path(request["folder"], "code"), str(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _run(become: Callable[..., None], request: dict[str, Any]) -> None:
    """Do what was asked for, and end as the interpreter does."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        become(**request)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001 - does what the interpreter would do
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def await_file(path: Path, timeout_seconds: float) -> str:
    """Return a file's text when it is there; TimeoutError if it does not come."""
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} of {path.parent} did not come")
        time.sleep(0.002)
    return path.read_text()


def put(path: Path, text: str) -> None:
    """Write a file that is whole as soon as it is there."""
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    partial.rename(path)
