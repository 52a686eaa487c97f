"""A real Slurm of two virtual nodes: Debian's daemons, one slurmd on each of the two hosts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import HERE, NAMES, TOP, Hosts, outside, until

CONFIGURATION = """\
ClusterName=twinflow
SlurmctldHost={host}({address})
SlurmctldPort=16817
SlurmdPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits for old credentials to expire: two minutes, unless told.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# Processes are found without control groups, which a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
# Two nodes of two cores share the machine's.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=20
InactiveLimit=0
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-2] NodeHostname=node[1-2] NodeAddr=10.77.0.[1-2] CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 MaxTime=2-0
PartitionName=high Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=2-0
PartitionName=owned Nodes=node[1-2] AllowAccounts=team MaxTime=2-0
"""
# Any two devices do for GPUs: the trainer computes on the CPU where CUDA finds none.
GPUS = "NodeName=node[1-2] Name=gpu Count=2 File=/dev/zero,/dev/full\n"


@dataclass(kw_only=True)
class Slurm:
    """The cluster; `folder` holds its files, `hosts` are its nodes."""

    folder: Path
    hosts: Hosts
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands find this cluster."""
        return outside() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, from the repository's top."""
        return subprocess.run(
            words, cwd=TOP, env=self.env | env, capture_output=True, text=True, timeout=400
        )

    def ask(self, *words: str, **env: str) -> str:
        """Run a command that has to succeed, and return what it printed."""
        ended = self.run(*words, **env)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        return ended.stdout.strip()

    def begin(self, daemon: str) -> None:
        """Start slurmctld, or a node's slurmd."""
        with (self.folder / f"{daemon}.out").open("ab") as out:
            words = ["slurmctld", "-D", "-c"]
            if daemon in NAMES:
                words = self.hosts.command(daemon, "slurmd", "-D", "-N", daemon)
            self._daemons[daemon] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *words), env=self.env, stdout=out, stderr=out
            )

    def end(self, daemon: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a daemon a signal, and wait for its end."""
        process = self._daemons.pop(daemon)
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def await_nodes(self, seconds: float = 60) -> None:
        """Wait until both nodes are free."""

        def free() -> bool:
            states = self.run("sinfo", "--noheader", "--partition=low", "--Node", "--format=%T")
            return states.stdout.split() == ["idle"] * len(NAMES)

        until(free, seconds, "both nodes are idle")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start all daemons; stop them at the end, and what they run."""
        for name in ("state", *(f"spool/{node}" for node in NAMES)):
            (self.folder / name).mkdir(parents=True)
        text = CONFIGURATION.format(folder=self.folder, host=socket.gethostname(), address=HERE)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(GPUS)
        try:
            for daemon in ("slurmctld", *NAMES):
                self.begin(daemon)
            self.await_nodes()
            yield
        finally:
            if "slurmctld" in self._daemons:
                self.run("scancel", "--user=root", "--signal=KILL")
            for daemon in reversed(list(self._daemons)):
                self.end(daemon)

    def submit(self, *words: str, **env: str) -> Job:
        """Submit a job script, and return the job."""
        return Job(slurm=self, number=int(self.ask("sbatch", "--parsable", *words, **env)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of the cluster."""

    slurm: Slurm
    number: int

    def show(self, key: str) -> str:
        """Return what Slurm says of the job, such as JobState or Restarts; "" if nothing."""
        text = self.slurm.run("scontrol", "--oneliner", "show", "job", str(self.number)).stdout
        found = re.search(rf"(?<!\S){key}=(\S*)", text)
        return found[1] if found else ""

    @property
    def state(self) -> str:
        """Its state, such as RUNNING."""
        return self.show("JobState")

    def wait(self, seconds: float, *states: str) -> float:
        """Wait for one of the states, by default the end; return how long that took."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        try:
            return until(lambda: self.state in wanted, seconds, f"job {wanted}")
        except TimeoutError as error:
            raise AssertionError(f"{error}, but {self.state}:\n{self.told()}") from None

    def out(self) -> str:
        """Return what the job script printed."""
        path = Path(self.show("StdOut"))
        return path.read_text() if path.is_file() else ""

    def told(self) -> str:
        """Return all that is on disk about the job: its own file and its nodes' logs."""
        logs = sorted((self.slurm.folder / "logs" / str(self.number)).glob("*.log"))
        return self.out() + "".join(f"--- {path.name}\n{path.read_text()}" for path in logs)

    def signal(self, name: str) -> None:
        """Send the job script alone a signal, as Slurm does before the time limit."""
        self.slurm.ask("scancel", "--batch", f"--signal={name}", str(self.number))

    def cancel(self) -> None:
        """Cancel it."""
        self.slurm.ask("scancel", str(self.number))


@contextmanager
def munge(folder: Path) -> Iterator[None]:
    """Have munged, by which Slurm's daemons know one another: the system's, or one of our own."""
    with ExitStack() as stack:
        if subprocess.run(("munge", "--no-input"), capture_output=True).returncode:
            place = Path("/run/munge")
            place.mkdir(mode=0o755, exist_ok=True)
            subprocess.run(("chown", "munge:munge", place), check=True)
            out = stack.enter_context((folder / "munged.out").open("wb"))
            process = subprocess.Popen(
                (
                    *("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"),
                    *("munged", "--foreground", "--force"),
                ),
                stdout=out,
                stderr=out,
                env=os.environ | {"LC_ALL": "C"},
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)

            def answers() -> bool:
                asked = subprocess.run(("munge", "--no-input"), capture_output=True)
                return asked.returncode == 0

            until(answers, 20, "munged answers")
        yield
