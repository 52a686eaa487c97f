"""Data that cannot be used, on real ranks: all of them end alike, or all go on."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest

from tests.data.ranks import Job, Seen, take_all, together
from tests.data.server import Server, serve
from tests.data.tools import make_shards
from tests.helpers import spawn
from twinflow_train.data.stream import Ref

SHARDS, EACH = 6, 4
BATCH, STEPS = 8, 6
BAD = "000002.tar"
OPTIONS = {"window": 2, "lanes": 4, "prefetch": 1, "threads": 2}


def patch(folder: Path, old: bytes, new: bytes) -> None:
    """Change the first such bytes of the bad shard."""
    path = folder / BAD
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def lie(folder: Path, *, tokens: int) -> None:
    """Let the index say something else of a text, and sign it again."""
    index = folder / "000002.index.json"
    rows = json.loads(index.read_text())
    rows[1][5] = [tokens]
    index.write_text(json.dumps(rows))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][2]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lose_a_member(folder: Path) -> None:
    """Write the tar again without its first member, as large as it was."""
    path = folder / BAD
    size, members = path.stat().st_size, []
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member)
            assert data is not None
            members.append((member, data.read()))
    with tarfile.open(path, "w") as tar:
        for member, content in members[1:]:
            tar.addfile(member, io.BytesIO(content))
    with path.open("r+b") as file:
        file.truncate(size)


def cut_the_last(folder: Path) -> None:
    """End the tar within the last sample's tensors."""
    *_, last = json.loads((folder / "000002.index.json").read_text())
    path = folder / BAD
    path.write_bytes(path.read_bytes()[: last[1] + 100])


def not_a_number(folder: Path) -> None:
    """Make the latent of the shard's second sample so, number 9: they are filled with numbers."""
    patch(folder, b"\x10\x41" * 4, b"\xc0\x7f" * 4)


@dataclass(frozen=True)
class Fault:
    """What is done to a set, and what is said of it.

    bad: samples that cannot be used after it. names: what the message names. remote: it is read
    from behind a URL.
    """

    do: Callable[[Path], object]
    words: str
    bad: frozenset[int] = frozenset(range(2 * EACH, 3 * EACH))
    names: str = r"000002\.tar: sample s-(\d+)"
    remote: bool = False


FAULTS: Mapping[str, Fault] = {
    "lying-index": Fault(
        lambda folder: lie(folder, tokens=10**12),
        "not an index .* cannot hold",
        names=r"000002\.index\.json",
    ),
    "without-a-member": Fault(lose_a_member, "not safetensors: .*copy the file again"),
    "another-shape": Fault(
        lambda folder: patch(folder, b"[1,2,2]", b"[1,1,4]"),
        r"`latent` is bfloat16 \(1, 1, 4\), where bfloat16 \(1, 2, 2\) is wanted",
        bad=frozenset([8]),
    ),
    "another-type": Fault(
        lambda folder: patch(folder, b'"dtype":"BF16"', b'"dtype":"F16" '),
        "`latent` is float16 .* where bfloat16 .* is wanted",
        bad=frozenset([8]),
    ),
    "not-a-number": Fault(not_a_number, "`latent` is not finite", bad=frozenset([9])),
    "another-index": Fault(
        lambda folder: (folder / "000002.index.json").write_text("[]"),
        "SHA-256 is",
        names=r"000002\.index\.json",
    ),
    "vanished": Fault(lambda folder: (folder / BAD).unlink(), "No such file", remote=True),
    "cut": Fault(cut_the_last, r"100 bytes came of \d+", bad=frozenset([11]), remote=True),
    "broken": Fault(
        lambda folder: None,
        ".*500.*; start again when it answers, or raise data.attempts",
        remote=True,
    ),
    "silent": Fault(lambda folder: None, "no answer in 1 seconds", remote=True),
}


@dataclass(frozen=True)
class Sets:
    """Damaged sets and the whole one, and what is to be shown of them."""

    server: Server
    jobs: dict[str, Job] = field(default_factory=dict)

    def add(self, name: str, path: str, **more: object) -> None:
        """Plan a job."""
        options = OPTIONS | {"path": path} | more
        patience = 1 if "silent" in name else None
        self.jobs[name] = Job(options=options, batch=BATCH, steps=STEPS, patience=patience)

    def refs(self, step: int) -> list[Ref]:
        """Return the samples that a step of the whole set shows."""
        stream = self.jobs["whole"].data().stream(seed=3, batch=BATCH)
        return stream.rows(stream.plan(step, range(BATCH), groups=[BATCH]))

    def first(self, bad: frozenset[int]) -> int:
        """Return the step that first shows a bad sample."""
        return next(n for n in range(STEPS) if bad & {ref.number for ref in self.refs(n)})

    def skipped(self, bad: frozenset[int]) -> list[int]:
        """Count, for each step, the bad samples that were to be shown up to its end."""
        each = [sum(ref.number in bad for ref in self.refs(n)) for n in range(STEPS)]
        return list(accumulate(each))

    def arm(self) -> None:
        """Let the server fail as it shall for one run of everything."""
        self.server.errors = {"broken/" + BAD: 10**6, "flaky/manifest.json": 1}
        self.server.cuts = {"flaky/null.safetensors": 1}
        self.server.stalls = {"silent/" + BAD: 3.0}
        for shard in range(SHARDS):
            for file in (f"flaky/{shard:06d}.tar", f"flaky/{shard:06d}.index.json"):
                self.server.errors[file] = self.server.cuts[file] = 1


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sets]:
    folder = tmp_path_factory.mktemp("sets")
    good = make_shards(folder / "whole", [((1, 2, 2), [3] * EACH)] * SHARDS)
    with serve(folder) as server:
        found = Sets(server)
        found.add("whole", str(good))
        for name, fault in FAULTS.items():
            bad = Path(shutil.copytree(good, folder / name))
            fault.do(bad)
            path = f"{server.url}/{bad.name}" if fault.remote else str(bad)
            found.add(f"{name}, raise", path, attempts=2)
            found.add(f"{name}, skip", path, attempts=2, on_error="skip")
            found.add(f"{name}, budget", path, attempts=2, on_error="skip", skip_budget=0)
        shutil.copytree(good, folder / "flaky")
        found.add("flaky", f"{server.url}/flaky", attempts=4)
        yield found


@pytest.fixture(scope="module", params=[2, 4])
def seen(request: pytest.FixtureRequest, sets: Sets) -> dict[str, list[Seen]]:
    """What each of some ranks saw of each job."""
    sets.arm()
    found = spawn(take_all, request.param, [*sets.jobs.values()], timeout_seconds=400)
    return {name: [rank[n] for rank in found] for n, name in enumerate(sets.jobs)}


def test_all_ranks_see_the_whole_set(sets: Sets, seen: dict[str, list[Seen]]) -> None:
    for step in range(STEPS):
        wanted = [f"s-{ref.number:05d}" for ref in sets.refs(step)]
        assert together(seen["whole"], step) == wanted


def test_what_passes_is_tried_again(sets: Sets, seen: dict[str, list[Seen]]) -> None:
    """Each file fails once with an error and once in the middle."""
    assert [one.error for one in seen["flaky"]] == [""] * len(seen["flaky"])
    assert [one.keys for one in seen["flaky"]] == [one.keys for one in seen["whole"]]
    assert max(sets.server.errors[f"flaky/{n:06d}.tar"] for n in range(SHARDS)) < 0
    assert max(sets.server.cuts[f"flaky/{n:06d}.tar"] for n in range(SHARDS)) < 0


@pytest.mark.parametrize("name", list(FAULTS))
def test_all_ranks_end_with_the_shard_the_key_and_the_cause(
    sets: Sets, seen: dict[str, list[Seen]], name: str
) -> None:
    fault, found = FAULTS[name], seen[f"{name}, raise"]
    assert len({one.error for one in found}) == 1
    said = re.search(rf"{fault.names}.*: {fault.words}", found[0].error)
    assert said, found[0].error
    if "s-" in fault.names:
        assert int(said[1]) in fault.bad
    for one, whole in zip(found, seen["whole"], strict=True):
        assert one.keys == whole.keys[: sets.first(fault.bad)]


@pytest.mark.parametrize("name", list(FAULTS))
def test_within_the_budget_others_are_shown_instead(
    sets: Sets, seen: dict[str, list[Seen]], name: str
) -> None:
    fault, found = FAULTS[name], seen[f"{name}, skip"]
    for one in found:
        assert one.error == ""
        assert one.skipped == sets.skipped(fault.bad)
    bad = {f"s-{number:05d}" for number in fault.bad}
    for step in range(STEPS):
        wanted = Counter(together(seen["whole"], step))
        assert Counter(together(found, step)) >= Counter(
            {key: count for key, count in wanted.items() if key not in bad}
        )
        assert not bad & set(together(found, step))


@pytest.mark.parametrize("name", list(FAULTS))
def test_the_end_of_the_budget_ends_all_ranks(
    sets: Sets, seen: dict[str, list[Seen]], name: str
) -> None:
    fault, found = FAULTS[name], seen[f"{name}, budget"]
    first = sets.first(fault.bad)
    many = sets.skipped(fault.bad)[first]
    for one in found:
        assert one.error.startswith(f"{many} samples could not be used and were skipped, more than")
        assert "data.skip_budget = 0" in one.error
        assert len(one.keys) == first
