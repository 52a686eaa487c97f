"""What launch/preflight.sh runs on every rank: compare the nodes, print a table, name problems."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import twinflow_train
from twinflow_train import dist
from twinflow_train.dist import World

LIBRARIES = ("torch", "diffusers", "transformers")
ROUNDS = 5
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank finds. skew: seconds its clock is ahead of rank 0's; memory in bytes.

    versions: what has to be the same everywhere; folder: what is wrong with the shared one.
    """

    node: str
    local_rank: int
    versions: dict[str, str]
    device: str
    free: int
    total: int
    skew: float
    disk: int
    folder: str


def main() -> None:
    """Look, compare, and exit with 2 on every rank if there is a problem."""
    options = arguments()
    with dist.start() as world:
        mine = find(Path(options.shared), world)
        ranks = [Facts(**json.loads(text)) for text in world.gather_texts(json.dumps(asdict(mine)))]
        seconds, size = all_reduce(world)
        # As nccl-tests counts: what a link carries, whatever the number of ranks.
        bandwidth = size / seconds * 2 * (world.size - 1) / world.size / 1e9
        found = list(dict.fromkeys(problems(ranks, bandwidth, world, options)))
        if world.main:
            print(
                table(ranks), f"all-reduce of {size >> 20} MiB over {world.size} ranks:", sep="\n"
            )
            print(f"  {seconds * 1e3:.1f} ms, bus bandwidth {bandwidth:.2f} GB/s")
            for problem in found:
                print(f"preflight: {problem}", file=sys.stderr)
            if not found:
                print("preflight: ok")
    sys.exit(2 if found else 0)


def arguments() -> argparse.Namespace:
    """Read the command line; launch/preflight.sh --help explains it."""
    parser = argparse.ArgumentParser(prog="preflight.sh", description=__doc__)
    parser.add_argument("--shared", default="outputs")
    parser.add_argument("--free", type=float)
    parser.add_argument("--bandwidth", type=float, default=0.0)
    parser.add_argument("--skew", type=float, default=1.0)
    return parser.parse_args()


def find(shared: Path, world: World) -> Facts:
    """Collect this rank's facts; collective."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        device = torch.cuda.get_device_name(world.device)
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
        device = "cpu"
    problem = try_folder(shared, world)
    return Facts(
        node=platform.node(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        versions=versions(),
        device=device,
        free=free,
        total=total,
        skew=skew(world),
        disk=shutil.disk_usage(shared).free if shared.is_dir() else 0,
        folder=problem,
    )


def versions() -> dict[str, str]:
    """Return what has to be the same on all nodes."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    package = Path(twinflow_train.__file__).parent
    content = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return found | {"code": content.hexdigest()[:8]}


def try_folder(shared: Path, world: World) -> str:
    """Write, lock and read the shared folder from every node; return what failed; collective."""
    token = world.gather_texts(os.urandom(8).hex())[0]
    mine = shared / f".preflight-{token}-{world.rank}"
    problem = ""
    try:
        shared.mkdir(parents=True, exist_ok=True)
        with mine.open("w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = f"cannot write and lock files there ({error.strerror})"
    world.barrier()
    if not problem and (unseen := world.size - seen(shared, token, world.size)):
        problem = f"does not see what {unseen} of {world.size} ranks wrote"
    world.barrier()
    with suppress(OSError):
        mine.unlink()
    return problem


def seen(shared: Path, token: str, wanted: int) -> int:
    """Count the ranks' files, for up to ten seconds: a network's folder is seen late."""
    deadline = time.monotonic() + 10
    while True:
        # A failed write elsewhere is not told here, so the rest of the wait is for nothing.
        count = sum(1 for name in os.listdir(shared) if name.startswith(f".preflight-{token}-"))
        if count == wanted or time.monotonic() > deadline:
            return count
        time.sleep(0.2)


def skew(world: World) -> float:
    """Return how far this clock is ahead of rank 0's, up to a message's time; collective."""
    found = []
    for _ in range(ROUNDS):
        world.barrier()
        clocks = world.gather(torch.tensor(time.time(), dtype=torch.float64, device=world.device))
        found.append(float(clocks.flatten()[world.rank] - clocks.flatten()[0]))
    return statistics.median(found)


def all_reduce(world: World) -> tuple[float, int]:
    """Return the seconds and the bytes of one sum over all ranks; collective."""
    gpu = world.device.type == "cuda"
    size = (256 if gpu else 16) << 20
    data = torch.ones(size // 4, device=world.device)
    times = []
    for _ in range(2 * ROUNDS):
        data.fill_(1.0)
        world.barrier()
        began = time.perf_counter()
        world.sum(data)
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if not bool((data == world.size).all()):
            raise RuntimeError(f"rank {world.rank}: the sum of {world.size} ones is {data.max()}")
    # The first rounds open connections.
    slowest = world.gather(torch.tensor(times[ROUNDS:], device=world.device)).max(0).values
    return float(slowest.median()), size


def problems(
    ranks: Sequence[Facts], bandwidth: float, world: World, options: argparse.Namespace
) -> Iterator[str]:
    """Yield one line for everything that has to be mended, and how."""
    first = ranks[0]
    for name in first.versions:
        groups: dict[str, list[str]] = {}
        for rank in ranks:
            nodes = groups.setdefault(rank.versions.get(name, "none"), [])
            if rank.node not in nodes:
                nodes.append(rank.node)
        if len(groups) > 1:
            told = "; ".join(f"{value} on {', '.join(nodes)}" for value, nodes in groups.items())
            yield f"{name} differs: {told}. Start all nodes from one shared folder or image"
    for rank in ranks:
        where = f"{rank.node} (rank {rank.local_rank} there)"
        if rank.folder:
            yield (
                f"{rank.node}: {options.shared} {rank.folder}. Give a folder that all nodes mount, "
                "with locks (--shared, and folder= of the run)"
            )
        if abs(rank.skew) > options.skew:
            yield f"{rank.node}: its clock is {rank.skew:+.1f} s off {first.node}'s. Start chrony"
        if rank.device != "cpu":
            least = 0.9 * rank.total if options.free is None else options.free * GIB
            if rank.free < least:
                yield (
                    f"{where}: {rank.free / GIB:.0f} of {rank.total / GIB:.0f} GiB are free, "
                    f"needed are {least / GIB:.0f}. See nvidia-smi for who holds the rest"
                )
        if rank.device != first.device:
            yield f"{where}: {rank.device}, but {first.node} has {first.device}. Ask for one kind"
    if world.size > 1 and bandwidth < options.bandwidth:
        yield (
            f"bus bandwidth {bandwidth:.2f} GB/s is below --bandwidth {options.bandwidth:g}. "
            "NCCL_DEBUG=INFO shows the paths in use; see launch/env.sh for choosing interfaces"
        )


def table(ranks: Sequence[Facts]) -> str:
    """Lay out one line a node."""
    rows = [("node", "ranks", "device", "free GiB", *ranks[0].versions, "clock", "disk", "folder")]
    for node in dict.fromkeys(rank.node for rank in ranks):
        here = [rank for rank in ranks if rank.node == node]
        one = here[0]
        rows.append(
            (
                node,
                str(len(here)),
                one.device,
                f"{min(rank.free for rank in here) / GIB:.0f}/{one.total / GIB:.0f}",
                *one.versions.values(),
                f"{one.skew:+.3f} s",
                f"{one.disk / GIB:.0f} GiB",
                "fails" if any(rank.folder for rank in here) else "ok",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(w) for word, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
