"""Two hosts, a Slurm on them, and a tiny set and base to train from: once a session.

`make test-cluster` runs these tests; they need root, and what it installs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, joined
from tests.cluster.slurm import Slurm, munge
from tests.tiny import build

COMMANDS = ("ip", "nsenter", "unshare", "setpriv", "munged", "slurmctld", "slurmd", "sbatch")


def pytest_sessionstart() -> None:
    """Refuse, in one line, a machine on which nothing here can run."""
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if os.geteuid() or missing:
        why = f"missing are {', '.join(missing)}" if missing else "this is not root"
        pytest.exit(f"the cluster tests need root and Slurm, and {why}: run make test-cluster", 1)


@contextmanager
def alone() -> Iterator[None]:
    """Keep two sessions from making the same hosts at once."""
    with Path("/run/lock/twinflow-cluster").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    with alone(), joined(folder) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def slurm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(folder=tmp_path_factory.mktemp("slurm"), hosts=hosts)
    with munge(cluster.folder), cluster.running():
        yield cluster


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of digits, a judge and a base."""
    folder = tmp_path_factory.mktemp("made")
    build(folder)
    return folder
