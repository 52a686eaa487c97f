"""Drawing what is missing, dealt to processes; a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.evaluate.contenders import Artist, Contender, Entry, Stock
from twinflow_train.evaluate.suites import Prompt, Suite
from twinflow_train.files import whole_file

PICTURES, TIMES, PLAN, LATENCY = "pictures", "times", "plan.json", "latency.json"
REPEATS = 3
"""Pictures drawn alone to time one, after one that is not counted."""


def draw(
    who: Contender | Stock,
    *,
    suite: Suite,
    prompts: Sequence[Prompt],
    batch: int,
    folder: Path,
    world: World,
) -> list[Entry]:
    """Draw all that a model has not drawn yet, and time it; return its entries.

    Prompts are cut into the same chunks whatever the number of processes, so pictures do not
    depend on it. Only rank 0 shows a bar. Raises UserError if other pictures lie there.
    """
    entries = who.entries()
    chunks = cut(prompts, max(batch // suite.images, 1))
    if world.main:
        for entry in entries:
            _agree(folder / entry.folder, entry, suite, prompts, at_once=len(chunks[0]))
    world.barrier()
    mine = chunks[world.rank :: world.size]
    missing = {
        entry.folder: [c for c in mine if not _there(folder / entry.folder, suite, c)]
        for entry in entries
    }
    lacking = [
        entry
        for entry in entries
        if missing[entry.folder] or (world.main and not (folder / entry.folder / LATENCY).is_file())
    ]
    if lacking:
        artists = who.artists(lacking, [prompt.text for prompt in prompts], world.device)
        for entry, artist in zip(lacking, artists, strict=True):
            done = len(mine) - len(missing[entry.folder])
            bar = tqdm(
                total=len(mine),
                initial=done,
                desc=str(entry.folder),
                unit="item",
                disable=not world.main,
                dynamic_ncols=True,
            )
            with bar:
                for chunk in missing[entry.folder]:
                    _draw(artist, suite, chunk, batch, folder / entry.folder, world.device)
                    bar.update()
            if world.main:
                _time(artist, prompts[0], folder / entry.folder, world.device)
    return entries


def cut(prompts: Sequence[Prompt], each: int) -> list[Sequence[Prompt]]:
    """Cut prompts into chunks."""
    return [prompts[start : start + each] for start in range(0, len(prompts), each)]


def seconds(folder: Path) -> dict[str, float]:
    """Read what an entry's pictures took: one alone, and on average in batches, on one device.

    seconds_per_image: in the network; latency: of one picture alone, from its text to its pixels;
    images_per_second: in batches, from text to pixels.
    """
    parts = [json.loads(file.read_text()) for file in sorted((folder / TIMES).glob("*.json"))]
    # The first of a process takes what is compiled and allocated once: the median does not see it.
    network = median(part["network"] / part["images"] for part in parts)
    whole = median(part["whole"] / part["images"] for part in parts)
    alone = json.loads((folder / LATENCY).read_text())
    return {
        "seconds_per_image": network,
        "latency": alone["seconds"],
        "images_per_second": 1 / whole,
    }


def _agree(
    folder: Path, entry: Entry, suite: Suite, prompts: Sequence[Prompt], *, at_once: int
) -> None:
    """Write down what pictures are made of; UserError if it is not what was written before."""
    made_of = entry.made_of | {
        "suite": suite.name,
        "images": suite.images,
        "at_once": at_once,
        "prompts": [prompt.text for prompt in prompts],
    }
    path = folder / PLAN
    if not path.is_file():
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(made_of, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    now = json.loads(json.dumps(made_of))
    if changed := [key for key in now if before.get(key) != now[key]]:
        raise UserError(
            f"folder: {folder} holds pictures of other {', '.join(changed)}; give another folder=, "
            "or remove it"
        )


def _there(folder: Path, suite: Suite, chunk: Sequence[Prompt]) -> bool:
    """Tell whether a chunk was drawn to its end: its times are written last."""
    return _times(folder, chunk).is_file() and all(
        (folder / PICTURES / file).is_file() for prompt in chunk for file in suite.files(prompt)
    )


def _times(folder: Path, chunk: Sequence[Prompt]) -> Path:
    return folder / TIMES / f"{chunk[0].number:06d}.json"


def _draw(
    artist: Artist,
    suite: Suite,
    chunk: Sequence[Prompt],
    batch: int,
    folder: Path,
    device: torch.device,
) -> None:
    """Draw a chunk and write it."""
    began = _now(device)
    pictures, network = artist.draw(
        [prompt.text for prompt in chunk],
        images=suite.images,
        first=chunk[0].number * suite.images,
        batch=batch,
    )
    whole = _now(device) - began
    for number, prompt in enumerate(chunk):
        own = pictures[number * suite.images : (number + 1) * suite.images]
        suite.write(folder / PICTURES, prompt, own)
    said = {"images": len(pictures), "network": network, "whole": whole}
    with whole_file(_times(folder, chunk)) as unfinished:
        unfinished.write_text(json.dumps(said) + "\n")


def _time(artist: Artist, prompt: Prompt, folder: Path, device: torch.device) -> None:
    """Time one picture alone."""
    if (folder / LATENCY).is_file():
        return
    found = []
    for _ in range(REPEATS + 1):
        began = _now(device)
        artist.draw([prompt.text], images=1, first=0, batch=1)
        found.append(_now(device) - began)
    with whole_file(folder / LATENCY) as unfinished:
        unfinished.write_text(json.dumps({"seconds": median(found[1:]), "repeats": REPEATS}) + "\n")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
