"""Export: `python -m twinflow_train.export RUN` makes a diffusers folder of a checkpoint.

RUN is a run's folder. The weights are streamed from the checkpoint's files, one tensor at a time:
no GPU, no process group, and little memory, whatever number of ranks wrote them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from twinflow_train.checkpoint import choose, kinds, whole
from twinflow_train.errors import UserError
from twinflow_train.reporting import card, summary
from twinflow_train.run import model_of
from twinflow_train.runfolder import read_manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {"ema": "average", "slow": "slow", "raw": "model"}


def export(
    run: Path, *, weights: str | None, step: int | None, dtype: str, out: Path | None
) -> Path:
    """Write one checkpoint's weights, its sampler settings and a model card; return the folder.

    weights: "ema", "slow" or "raw"; None: averaged if there is an average. step: of the checkpoint;
    None is the newest. out: None is RUN/export-STEP-WEIGHTS.

    Raises:
        UserError: no such run, checkpoint or weights.
    """
    manifest = read_manifest(run)
    index = choose(manifest["config"].get("checkpoints") or str(run), step=step)
    there = [name for name, kind in KINDS.items() if kind in kinds(index)]
    chosen = weights or there[0]
    if chosen not in there:
        raise UserError(f"{index.folder} holds no {chosen} weights; it has: {', '.join(there)}")
    at = index.progress["step"]
    folder = out or run / f"export-{at:08d}-{chosen}"
    tensors = whole(index, KINDS[chosen])
    model_of(index.run["model"]).save(folder, _cast(tensors, DTYPES[dtype]))
    card.write(
        folder,
        manifest=manifest,
        kind=KINDS[chosen],
        step=at,
        samples=index.progress["samples"],
        summary=_summary(run, at),
    )
    return folder


def _cast(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor.to(dtype)) for name, tensor in tensors)


def _summary(run: Path, step: int) -> dict[str, object]:
    """Read the run's results if they are of this step."""
    if not (run / summary.FILE).is_file():
        return {}
    found = summary.read(run)
    return found if found["step"] == step else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m twinflow_train.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--weights", choices=list(KINDS), help="ema if there is an average")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--out", type=Path, help="RUN/export-STEP-WEIGHTS")
    words = vars(parser.parse_args())
    try:
        print(export(words.pop("run"), **words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
