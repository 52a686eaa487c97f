"""Torchrun on two hosts without a scheduler: one is cut off in mid-run, and comes back."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from tests.cluster.hosts import Hosts, until
from tests.tiny import curve, steps, words

STEPS = 60
PORT = 29500
HANG_SECONDS = 15
ENV = {
    # Seconds instead of the minutes that real networks are given.
    "RDZV_CONF": "join_timeout=300,last_call_timeout=5",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
}


class Two:
    """One run on both hosts, that goes on with one."""

    def __init__(self, hosts: Hosts, made: Path, folder: Path) -> None:
        self.hosts, self.folder, self._log = hosts, folder, folder.parent
        small = (f"steps={STEPS}", "save_every=4", "eval_every=0")
        self._overrides = words(
            made, folder, *small, f"faults.hang_seconds={HANG_SECONDS}", "log_every=1"
        )

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start torchrun on a host."""
        return self.hosts.start(
            name,
            *("launch/torchrun.sh", "--nodes", "1:2", "--gpus", "1", "--head", f"node1:{PORT}"),
            *("--preflight", "off", "--", *self._overrides),
            log=self._log / f"{name}.log",
            env=ENV,
        )

    def ranks(self) -> int:
        """Return how many ranks the run last began with."""
        path = self.folder / "manifest.json"
        return json.loads(path.read_text())["ranks"] if path.exists() else 0

    def step(self) -> int:
        """Return the last step on record."""
        metrics = self.folder / "metrics.jsonl"
        return max(steps(self.folder), default=-1) if metrics.exists() else -1

    def told(self) -> str:
        """Return what both hosts printed."""
        logs = sorted(self._log.glob("*.log"))
        return "".join(f"--- {path.name}\n{path.read_text()[-6000:]}" for path in logs)


def test_a_host_is_cut_off_and_comes_back(hosts: Hosts, made: Path, tmp_path: Path) -> None:
    two = Two(hosts, made, tmp_path / "run")
    before = set(hosts.processes("node2"))  # Slurm's daemon, where its tests came first
    first, second = two.start("node1"), two.start("node2")
    try:
        until(lambda: two.ranks() == 2 and two.step() >= 8, 300, "both train")
        hosts.link("node2", "down")
        cut, began = two.step(), time.monotonic()

        # Both sides notice; the one that holds the meeting goes on alone, from a checkpoint.
        until(lambda: not hosts.trainers("node2"), 120, "node2 stops")
        until(lambda: two.ranks() == 1 and two.step() > cut, 150, "node1 goes on")
        print(f"alone after {time.monotonic() - began:.0f} s")
        assert not hosts.trainers("node2")
        hosts.send("node1", signal.SIGSTOP)  # or it would be done before the other is back

        # What is left on the lonely host ends in a set time, though its torchrun hangs.
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) != 0
        assert set(hosts.processes("node2")) <= before

        # It comes back, and takes part again.
        hosts.link("node2", "up")
        second = two.start("node2")
        until(lambda: hosts.meets("node2", PORT), 200, "node2 is back")
        time.sleep(1)
        hosts.send("node1", signal.SIGCONT)
        until(lambda: two.ranks() == 2, 300, "both train again")
        assert (first.wait(400), second.wait(100)) == (0, 0)
        assert steps(two.folder) == list(range(STEPS))
        assert len(curve(two.folder)) == STEPS + 2  # and two evaluations
    except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{error}\n{two.told()}") from error
    finally:
        hosts.link("node2", "up")
        for process in (first, second):
            process.kill()
            process.wait()
