"""Does a run end with the same numbers, whatever happens to its processes and files on the way?

A job of two ranks is killed, stopped, asked to stop, and finds shards away and its newest
checkpoint damaged, at random moments; a supervisor starts it again, as a cluster would. At the end
its losses, its evaluations and every byte of its last checkpoint must be those of a run that nobody
disturbed; then the next one begins, until the time is up.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ablation import machine, write
from tests.program import Program, Running, serve
from tests.tiny import curve
from twinflow_train.faults import HUNG, Faults
from twinflow_train.rng import digest
from twinflow_train.run import INTERRUPTED

RANKS = 2
MARGIN_SECONDS = 90
"""For whatever ends by itself, beyond the job's own limits: for starts, on a loaded machine."""
KINDS = (
    "killed",
    "asked to stop",
    "stopped for good",
    "stopped for a while",
    "shard away",
    "checkpoint damaged",
)
DEADLY = ("killed", "asked to stop", "shard away", "checkpoint damaged")
"""After these torchrun ends the other ranks; a request is deadly before a rank listens to it."""
GRACE_SECONDS = 10
PASSED_OVER = re.compile(r"step-\d{8}, incomplete or damaged")

Words = Callable[[Path], Sequence[str]]


@dataclass(kw_only=True)
class Soak:
    """A job and what has happened to it.

    words: its command line for a run folder. shards: the set that it trains on, to take a file of.
    scratch: where its run folders go. most: a fault comes within so much of the time that the run
    takes when nothing happens. hang: seconds after which a step counts as hanging. seed: of the
    faults. counts: of what happened. starts: of the job. ends: of its ranks, by exit code.
    passed_over: damaged checkpoints. ended: ranks that were ended because another had died, before
    they noticed. by_itself: starts that ended as hung with no fault of ours.
    seconds: of all disturbed runs together; usual: of one that nobody disturbed.
    """

    program: Program
    words: Words
    shards: Path
    scratch: Path
    most: float
    hang: float
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    passed_over: int = 0
    by_itself: int = 0
    ended: int = 0
    seconds: float = 0.0
    usual: float = 0.0
    _next: int = 0

    def go_on(self, *, seconds: float = 0.0, faults: int = 0) -> None:
        """Disturb run after run until the time is up and there were so many faults.

        Raises:
            AssertionError: a run differs, does not end by itself, or ends for no reason.
        """
        undisturbed = self.scratch / "undisturbed"
        began = time.monotonic()
        with self.program.group(RANKS, *self._command(undisturbed)) as ranks:
            ended = [rank.wait(900) for rank in ranks]
        self.usual = time.monotonic() - began
        said = f"it fails when nothing happens: {ended[0].err[-2000:]}"
        assert [one.code for one in ended] == [0] * RANKS, said
        began = time.monotonic()

        def more() -> bool:
            return time.monotonic() - began < seconds or self._next < faults

        while not self.runs or more():
            folder = self.scratch / f"run-{self.runs}"
            while not self._start(folder, more):
                pass
            compare(folder, undisturbed)
            self.runs += 1
            shutil.rmtree(folder)
        self.seconds = time.monotonic() - began

    def _command(self, folder: Path) -> list[str]:
        return [*self.words(folder), f"faults.hang_seconds={self.hang}"]

    @property
    def _end_seconds(self) -> float:
        """What a rank may take to end by itself once another is gone or still."""
        return Faults(hang_seconds=self.hang).saving_seconds + MARGIN_SECONDS

    def _start(self, folder: Path, more: Callable[[], bool]) -> bool:
        """Start the job, and let faults happen until it ends; return whether it was finished."""
        self.starts += 1
        with self.program.group(RANKS, *self._command(folder)) as ranks:
            kind, victim = "", -1
            while all(rank.alive for rank in ranks) and not kind:
                time.sleep(0.01)
                if more():
                    kind, victim = self._disturb(ranks, folder)
            if kind in DEADLY:
                self._end(ranks)
            # Where one is stopped the others end by themselves; then it dies, as with its node.
            ended = {n: one.wait(self._end_seconds) for n, one in enumerate(ranks) if n != victim}
            if victim >= 0:
                if kind == "stopped for good":
                    ranks[victim].send(signal.SIGKILL)
                ended[victim] = ranks[victim].wait(self._end_seconds)
        codes = [ended[n].code for n in range(RANKS)]
        if not kind and any(codes):
            # On a crowded machine a step may take as long as one that hangs.
            self.by_itself += 1
            said = "\n".join(one.err[-2000:] for one in ended.values())
            assert HUNG in codes, f"it ended by itself, {codes}: {said}"
            assert self.by_itself < 10, "there is no time for it on this machine"
        self.ends.update(map(str, codes))
        self.passed_over += len(PASSED_OVER.findall(ended[0].err))
        if kind == "shard away":
            self._without_shard(folder)
        if kind == "checkpoint damaged":
            self._damage(folder)
        return not any(codes)

    def _end(self, ranks: Sequence[Running]) -> None:
        """Do as torchrun does once a rank has died: end those that have not ended by themselves."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(rank.alive for rank in ranks):
            time.sleep(0.01)
        if any(not rank.alive and rank.code != INTERRUPTED for rank in ranks):
            for rank in ranks:
                self.ended += rank.alive
                rank.send(signal.SIGKILL)

    def _disturb(self, ranks: Sequence[Running], folder: Path) -> tuple[str, int]:
        """Wait a while and let something happen; return what, and to whom, if the job ends.

        Of any six faults in a row that begin with a multiple of six, each is of another kind.
        """
        turn, place = divmod(self._next, len(KINDS))
        kind = sorted(KINDS, key=lambda one: digest("soak", self.seed, "what", turn, one))[place]
        waits = digest("soak", self.seed, "when", self._next) % 1000 / 1000
        victim = digest("soak", self.seed, "whom", self._next) % RANKS
        deadline = time.monotonic() + waits * self.most * self.usual
        there = {
            "checkpoint damaged": "checkpoints/step-*[0-9]",
            "stopped for good": "metrics.jsonl",
        }
        needs = there.get(kind, "")
        while time.monotonic() < deadline or (needs and not any(folder.glob(needs))):
            if not all(rank.alive for rank in ranks):
                return "", -1
            time.sleep(0.01)
        self._next += 1
        self.counts[kind] += 1
        if kind == "asked to stop":
            ranks[victim].send(signal.SIGTERM)
        elif kind == "stopped for a while":
            ranks[victim].send(signal.SIGSTOP)
            time.sleep(self.hang / 4)
            ranks[victim].send(signal.SIGCONT)
            return "", -1
        else:
            stops = kind == "stopped for good"
            ranks[victim].send(signal.SIGSTOP if stops else signal.SIGKILL)
        return kind, victim

    def _without_shard(self, folder: Path) -> None:
        """Take a shard away, see the job refused in words, and put it back."""
        shards = sorted(self.shards.glob("*.tar"))
        shard = shards[digest("soak", self.seed, "shard", self._next) % len(shards)]
        away = shard.with_suffix(".away")
        shard.rename(away)
        try:
            with self.program.group(RANKS, *self._command(folder)) as ranks:
                ended = [rank.wait(self._end_seconds) for rank in ranks]
        finally:
            away.rename(shard)
        assert [one.code for one in ended] == [2] * RANKS, ended[0].err
        assert any(f"{shard.name} is missing" in one.err for one in ended), ended[0].err

    def _damage(self, folder: Path) -> None:
        """Flip a bit of a file of the newest checkpoint, or cut the file short."""
        names = [f"rank-{rank:05d}.safetensors" for rank in range(RANKS)] + ["index.json"]
        path = whole(folder)[-1] / names[digest("soak", self.seed, "file", self._next) % len(names)]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if self._next % 2 else data[: len(data) // 2])


def compare(found: Path, wanted: Path) -> None:
    """Hold that two runs have the same numbers but for clock and memory: AssertionError."""
    assert curve(found) == curve(wanted), "the metrics differ"
    for name in ("files", "progress", "tensors"):
        ours, theirs = (_index(folder)[name] for folder in (found, wanted))
        assert ours == theirs, f"the last checkpoints differ in their {name}"


def whole(folder: Path) -> list[Path]:
    """List a run's whole checkpoints, the newest last."""
    return sorted(folder.glob("checkpoints/step-*[0-9]"))


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((whole(folder)[-1] / "index.json").read_text())
    return index


def report(soak: Soak) -> dict[str, Any]:
    """Say what the job has survived."""
    return {
        "minutes": round(soak.seconds / 60, 1),
        "seconds of an undisturbed run": round(soak.usual, 1),
        "ranks": RANKS,
        "runs": soak.runs,
        "starts": soak.starts,
        "faults": {kind: soak.counts[kind] for kind in KINDS},
        "all faults": sum(soak.counts.values()),
        "damaged checkpoints passed over": soak.passed_over,
        "ended before they noticed a death": soak.ended,
        "hung without a fault": soak.by_itself,
        "exit codes": dict(sorted(soak.ends.items())),
        "equal": True,
    }


def digits(folder: Path, *, made: Path, train: Path, steps: int) -> list[str]:
    """Return the command line of the digits job: real digits, its own size, few pictures."""
    return [
        *("experiment=digits_twinflow", "init_from=null", "tracking=none", f"folder={folder}"),
        *(f"steps={steps}", "batch=8", "micro_batch=4", "save_every=4", "eval_every=20"),
        *(f"data.path={train}", f"data.heldout={made / 'heldout'}"),
        f"evals.judge={made / 'judge.safetensors'}",
        *("evals.images=10", "evals.samplers=[{steps: 1}]", "evals.base=[{steps: 1}]"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Soak the digits job, and write and print what it survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (%(default)s)")
    parser.add_argument("--most", type=float, default=0.7, help="a fault within so much of a run")
    parser.add_argument("--hang", type=float, default=15, help="seconds: faults.hang_seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("datasets/digits"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        (scratch / "processes").mkdir()
        train = shutil.copytree(options.data / "train", scratch / "train")
        soak = Soak(
            program=serve(scratch=scratch / "processes", cwd=Path.cwd()),
            words=lambda folder: digits(
                folder, made=options.data, train=train, steps=options.steps
            ),
            shards=train,
            scratch=scratch,
            most=options.most,
            hang=options.hang,
            seed=options.seed,
        )
        soak.go_on(seconds=60 * options.minutes)
    asked = {key: vars(options)[key] for key in ("steps", "most", "hang", "seed")}
    found = {**machine(), **asked, **report(soak)}
    write(options.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
