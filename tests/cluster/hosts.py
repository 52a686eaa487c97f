"""Two hosts on one machine: each its own network, addresses and host name, joined by a bridge.

Needs root and iproute2. What an earlier, killed session left behind is removed first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
NAMES = ("node1", "node2")
BRIDGE, HERE = "twinflow0", "10.77.0.254"
SPACE = "twinflow-{}"
"""Name of a host's network namespace."""


def ip(*words: str, check: bool = True) -> str:
    """Run ip(8)."""
    found = subprocess.run(("ip", *words), capture_output=True, text=True)
    assert not check or found.returncode == 0, (words, found.stderr)
    return found.stdout


def until(true: Callable[[], object], seconds: float, what: str) -> float:
    """Wait until something holds, and return how long that took; TimeoutError if it never does."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not after {seconds} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - began


class Hosts:
    """The hosts; `folder` holds the file of their names."""

    def __init__(self, folder: Path) -> None:
        self.names = folder / "hosts"
        lines = [f"10.77.0.{n} {name}" for n, name in enumerate(NAMES, 1)]
        lines += ["127.0.0.1 localhost", f"{HERE} {socket.gethostname()}"]
        self.names.write_text("\n".join(lines) + "\n")

    def command(self, name: str, *words: str) -> list[str]:
        """Return the command line that runs a program on a host; it ends with its caller.

        Not `ip netns exec`, which hides the control groups that Slurm looks for.
        """
        script = f'mount --bind "{self.names}" /etc/hosts && hostname "{name}" && exec "$@"'
        return [
            *("setpriv", "--pdeathsig", "TERM"),
            *("nsenter", f"--net=/run/netns/{SPACE.format(name)}"),
            *("unshare", "--uts", "--mount", "sh", "-c", script, "sh", *words),
        ]

    def start(
        self, name: str, *words: str, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program on a host, from the repository's top; it prints into `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(name, *words),
                cwd=TOP,
                env=outside() | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def link(self, name: str, state: str) -> None:
        """Cut a host's cable (`down`) or mend it (`up`)."""
        ip("link", "set", f"tf-{name}", state)

    def processes(self, name: str, word: str = "") -> list[int]:
        """List the processes on a host whose command line begins with a word."""
        found = []
        for pid in ip("netns", "pids", SPACE.format(name)).split():
            with suppress(OSError):
                line = Path("/proc", pid, "cmdline").read_text().replace("\0", " ")
                if line and line.startswith(word):  # that of a dead one is empty
                    found.append(int(pid))
        return found

    def trainers(self, name: str) -> list[int]:
        """List the ranks on a host."""
        return self.processes(name, f"{sys.executable} -m twinflow_train.train")

    def send(self, name: str, number: signal.Signals) -> None:
        """Send the ranks on a host a signal."""
        for pid in self.trainers(name):
            os.kill(pid, number)

    def meets(self, name: str, port: int) -> bool:
        """Tell whether a host has a connection to a port of another one."""
        enter = ("nsenter", f"--net=/run/netns/{SPACE.format(name)}")
        asked = ("ss", "-Htn", "state", "established", "dport", "=", f":{port}")
        return bool(subprocess.run((*enter, *asked), capture_output=True, check=True).stdout)


def outside() -> dict[str, str]:
    """Return the environment without what a test session, torchrun or Slurm put there."""
    strange = (
        "SLURM",
        "SBATCH",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_",
        "PYTEST",
        "TWINFLOW",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strange)}
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}


@contextmanager
def joined(folder: Path) -> Iterator[Hosts]:
    """Make the hosts, and at the end kill what runs on them and remove them."""
    _remove()
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{HERE}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(NAMES, 1):
            space = SPACE.format(name)
            ip("netns", "add", space)
            ip("link", "add", f"tf-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"tf-{name}", "master", BRIDGE, "up")
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield Hosts(folder)
    finally:
        _remove()


def _remove() -> None:
    """Remove hosts, cables and the bridge, whatever there is of them."""
    for name in NAMES:
        space = SPACE.format(name)
        for pid in ip("netns", "pids", space, check=False).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", space, check=False)
        ip("link", "del", f"tf-{name}", check=False)
    ip("link", "del", BRIDGE, check=False)
