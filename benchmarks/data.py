"""How fast do shards become batches, against what the machine can copy and what a server can send?

`python -m benchmarks.data` writes sets of Qwen-Image's sizes, reads them from the page cache with
ours and with the stock WebDataset loader in turns, from a slow server with two ranks, and from the
middle of an epoch of many shards.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import webdataset as wds

from benchmarks.ablation import machine, write
from tests.data.ranks import Job, take
from tests.data.server import Server, serve
from tests.helpers import spawn
from twinflow_train.batch import Condition
from twinflow_train.data.loader import Shards, prefetch
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.writing import write_shards
from twinflow_train.rng import generator

LATENT = (16, 64, 64)
WIDTH = 3584
TOKENS = (120, 281)
"""Text lengths are spread evenly in this range: 200 on average."""
SHARD = 32
BATCH = 8
UNDER_WAY = 6
"""Batches that the loader has under way: two in each of two queues, one in the making, one used."""
SOURCE = 10**9
SHUFFLED = 64
"""Samples in WebDataset's shuffling buffer."""
ABOUT = About(encoder="none", revision="0", null_prompt="", licence="random numbers")
LATENCY = 0.05
RANKS = 2


def samples(count: int, *, latent: Sequence[int], width: int) -> Iterator[Sample]:
    """Yield random samples with texts of different lengths."""
    for index in range(count):
        draws = generator("benchmark", index)
        tokens = int(torch.randint(*TOKENS, (), generator=draws))
        yield Sample(
            key=f"s{index:06d}",
            latent=torch.randn(*latent, generator=draws).bfloat16(),
            texts=[torch.randn(tokens, width, generator=draws).bfloat16()],
            captions=["random"],
        )


def build(folder: Path, count: int, *, latent: Sequence[int], width: int, shard: int) -> Path:
    """Write a set, if it is not there."""
    if not (folder / "manifest.json").exists():
        print(f"writing {count:,} samples to {folder}", file=sys.stderr)
        null = torch.ones(4, width).bfloat16()
        made = samples(count, latent=latent, width=width)
        write_shards(folder, made, null=null, about=ABOUT, samples_per_shard=shard)
    return folder


def size(folder: Path) -> int:
    """Return the bytes of all tars."""
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def ours(folder: Path, batches: int, **options: Any) -> float:
    """Return samples a second of our loader, one rank; other options have their defaults."""
    data = Shards(path=str(folder), heldout=str(folder), **options)
    stream = data.stream(seed=0, batch=BATCH)
    made = data.batches(stream, rows=[list(range(BATCH))], groups=[BATCH], step=0)
    with closing(prefetch(made, data.prefetch)) as steps:
        return BATCH / pace(steps, batches)


def stock(folder: Path, batches: int, *, workers: int) -> float:
    """Return samples a second of the stock WebDataset loader on the same shards, endlessly."""
    dataset = (
        wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100, seed=0)
        .repeat()
        .shuffle(SHUFFLED)
        .decode(wds.handle_extension("safetensors", safetensors.torch.load))
        .batched(BATCH, collation_fn=collated)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    return BATCH / pace(iter(loader), batches)


def collated(rows: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, Condition]:
    """Make what ours makes: latents side by side, texts padded to the longest, with a mask."""
    tensors = [row["safetensors"] for row in rows]
    texts = Condition.pad([one["text.0"] for one in tensors])
    return torch.stack([one["latent"] for one in tensors]), texts


def pace(batches: Iterator[Any], count: int) -> float:
    """Return seconds a batch, after some that fill queues."""
    for _ in range(4):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - began) / count


def delivered(folder: Path, batches: int) -> list[int]:
    """Return the bytes of a row of each batch that ours hands over: latents, padded texts."""
    data = Shards(path=str(folder), heldout=str(folder), prefetch=0)
    stream = data.stream(seed=0, batch=BATCH)
    made = data.batches(stream, rows=[list(range(BATCH))], groups=[BATCH], step=0)
    with closing(made):
        found = [next(made)[0] for _ in range(batches)]
    return [(b.data[0].numel() + b.cond.tokens[0].numel()) * b.data.itemsize for b in found]


def copied(rows: Sequence[int], *, threads: int) -> float:
    """Return samples a second at which finished batches are copied from memory, no more done.

    rows: bytes of a row of each batch. They come from more memory than caches hold, and go to as
    much room as the loader has under way, used again as there.
    """
    largest = max(rows)
    source = np.ones(max(SOURCE, 2 * largest), np.uint8)
    room = np.ones((UNDER_WAY, BATCH, largest), np.uint8)

    def one(number: int) -> None:
        batch, row = divmod(number, BATCH)
        begin = number * largest % (len(source) - largest)
        np.copyto(room[batch % UNDER_WAY, row, : rows[batch]], source[begin : begin + rows[batch]])

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for _ in pool.map(one, range(len(rows) * BATCH)):
            pass
        return len(rows) * BATCH / (time.perf_counter() - began)


def local(folder: Path, *, rounds: int, batches: int) -> dict[str, Any]:
    """Measure all in turns and keep each one's best round: others only ever slow a machine down."""
    rows = delivered(folder, batches)
    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(folder, batches, threads=min(4, os.cpu_count() or 1)),
        "copying alone, 1 thread": lambda: copied(rows, threads=1),
        "copying alone, 2 threads": lambda: copied(rows, threads=2),
        "copying alone, 4 threads": lambda: copied(rows, threads=4),
        "webdataset, 0 workers": lambda: stock(folder, batches, workers=0),
        "webdataset, 2 workers": lambda: stock(folder, batches, workers=2),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, way) in zip(range(rounds * len(ways)), cycle(ways.items()), strict=False):
        found[name].append(round(way(), 1))
        print(f"{name}: {found[name][-1]:,.0f} samples/s", file=sys.stderr)
    best = {name: max(each) for name, each in found.items()}
    copying = {name: value for name, value in best.items() if name.startswith("copy")}
    rival = max(value for name, value in best.items() if name.startswith("webdataset"))
    return {
        "rounds": found,
        "bytes_per_sample": round(sum(rows) / len(rows)),
        "of_one_thread": round(best["ours"] / copying["copying alone, 1 thread"], 3),
        "of_all_threads": round(best["ours"] / max(copying.values()), 3),
        "times_webdataset": round(best["ours"] / rival, 2),
    }


def remote(folder: Path, *, rate: int) -> dict[str, Any]:
    """Show an epoch to two ranks from a server that is slow to answer and sends `rate` bytes/s."""
    steps = len(list(folder.glob("*.tar"))) * SHARD // BATCH
    with serve(folder, latency=LATENCY, rate=rate) as server:
        options = {"path": server.url, "heldout": server.url}
        seen = spawn(take, RANKS, Job(options=options, batch=BATCH, steps=steps))
        keys = {key for one in seen for step in one.keys for key in step}
        assert len(keys) == steps * BATCH, "not the whole epoch was shown"
        used = used_of(server, rate)
    return {
        "latency": LATENCY,
        "rate": rate,
        "ranks": RANKS,
        "of_rate": round(used, 3),
        "of_epoch_bytes": round(server.sent / size(folder), 3),
    }


def used_of(server: Server, rate: int) -> float:
    """Return the part of the rate that was used from the first request for data to the end."""
    return server.sent / (server.last - server.asked(".tar")[0].when) / rate


def first_batch(where: str, folder: Path, *, shards: int) -> dict[str, float]:
    """Return seconds from nothing to the first batch, fresh and at 90% of an epoch."""
    steps = shards * SHARD // BATCH
    found = {}
    for name, step in (("fresh", 0), ("resumed", steps * 9 // 10)):
        began = time.perf_counter()
        data = Shards(path=where, heldout=where)
        stream = data.stream(seed=0, batch=BATCH)
        made = data.batches(stream, rows=[list(range(BATCH))], groups=[BATCH], step=step)
        with closing(prefetch(made, data.prefetch)) as steps_made:
            (batch,) = next(steps_made)
            found[name] = round(time.perf_counter() - began, 3)
        assert len(batch) == BATCH
    return found


def resumed(folder: Path, *, shards: int, rounds: int) -> dict[str, Any]:
    """Measure the start in an epoch of many shards, on a disk and behind the slow server."""
    with serve(folder, latency=LATENCY) as server:
        places = {"disk": str(folder), "server": server.url}
        first_batch(places["disk"], folder, shards=shards)  # what is imported only once
        found = {
            name: [first_batch(where, folder, shards=shards) for _ in range(rounds)]
            for name, where in places.items()
        }
    worst = {
        name: round(max(one["resumed"] - one["fresh"] for one in each), 3)
        for name, each in found.items()
    }
    return {"shards": shards, "seconds": found, "later_by_at_most": worst}


def table(found: dict[str, Any]) -> str:
    """Lay the results out in Markdown."""
    best = {name: max(each) for name, each in found["local"]["rounds"].items()}
    each = found["local"]["bytes_per_sample"]
    lines = [
        "| from the page cache, batches of 8 | samples/s | GB/s of batches |",
        "|---|---:|---:|",
        *(f"| {n} | {value:,.0f} | {value * each / 1e9:.2f} |" for n, value in best.items()),
        "",
        f"Ours is at {found['local']['of_one_thread']:.0%} of what one thread copies, at "
        f"{found['local']['of_all_threads']:.0%} of what all can, and "
        f"{found['local']['times_webdataset']:.1f} times as fast as WebDataset.",
    ]
    far, start = found["remote"], found["resume"]
    lines += [
        "",
        f"From a server with {far['latency'] * 1000:.0f} ms latency and {far['rate'] / 1e6:.0f} "
        f"MB/s, {far['ranks']} ranks: {far['of_rate']:.0%} of its rate, "
        f"{far['of_epoch_bytes']:.2f} times the epoch's bytes.",
        "",
        f"First batch at 90% of an epoch of {start['shards']:,} shards, against a fresh start's: "
        + ", ".join(f"{late:+.2f} s ({name})" for name, late in start["later_by_at_most"].items())
        + ".",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Build the sets, measure, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=16, help="of 32 samples (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all in turns (%(default)s)")
    parser.add_argument("--batches", type=int, default=96, help="of 8, a round (%(default)s)")
    parser.add_argument("--rate", type=float, default=40.0, help="MB/s of the server (%(default)s)")
    parser.add_argument("--many", type=int, default=1000, help="shards of the long epoch")
    parser.add_argument("--folder", type=Path, help="where to put the sets; else a temporary one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"))
    words = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = words.folder or Path(temporary)
        large = build(
            folder / "large", words.shards * SHARD, latent=LATENT, width=WIDTH, shard=SHARD
        )
        many = build(folder / "many", words.many * SHARD, latent=(4, 8, 8), width=16, shard=SHARD)
        found = {
            **machine(),
            "local": local(large, rounds=words.rounds, batches=words.batches),
            "remote": remote(large, rate=round(words.rate * 1e6)),
            "resume": resumed(many, shards=words.many, rounds=words.rounds),
        }
    write(words.out, found)
    print(table(found))


if __name__ == "__main__":
    main()
