"""Export: `python -m twinflow_train.export RUN` makes a diffusers folder of a checkpoint.

RUN is a run's folder. The weights are streamed from the checkpoint's files, one tensor at a time:
no GPU, no process group, and little memory, whatever number of ranks wrote them. Of a LoRA run
this is the LoRA; with --merge it is the whole network, base and LoRA in one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinflow_train.checkpoint import choose, kinds, whole
from twinflow_train.errors import UserError
from twinflow_train.models.adapter import Adapter, NoAdapter, Tensors
from twinflow_train.models.base import Model
from twinflow_train.models.hub import complete, located, pipeline_at
from twinflow_train.models.lora import LoRA, fingerprint
from twinflow_train.reporting import card, summary
from twinflow_train.run import adapter_of, model_of
from twinflow_train.runfolder import read_manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {"ema": "average", "slow": "slow", "raw": "model"}


def export(
    run: Path,
    *,
    weights: str | None,
    step: int | None,
    dtype: str,
    out: Path | None,
    merge: bool = False,
    base: str | None = None,
    pipeline: str | None = None,
) -> Path:
    """Write one checkpoint's weights, its sampler settings and a model card; return the folder.

    weights: "ema", "slow" or "raw"; None: averaged if there is an average. step: of the checkpoint;
    None is the newest. out: None is RUN/export-STEP-WEIGHTS, and -merged. merge: add a LoRA to its
    base. base: where that is now; None is where it was. pipeline: put the other parts of this
    pipeline beside the transformer, and it is one itself.

    Raises:
        UserError: no such run, checkpoint or weights; or nothing to merge, or another base.
    """
    manifest = read_manifest(run)
    index = choose(manifest["config"].get("checkpoints") or str(run), step=step)
    there = [name for name, kind in KINDS.items() if kind in kinds(index)]
    chosen = weights or there[0]
    if chosen not in there:
        raise UserError(f"{index.folder} holds no {chosen} weights; it has: {', '.join(there)}")
    at = index.progress["step"]
    folder = out or run / f"export-{at:08d}-{chosen}{'-merged' if merge else ''}"
    model, adapter = model_of(index.run["model"]), adapter_of(index.run.get("adapter", {}))
    tensors: Tensors = whole(index, KINDS[chosen])
    if merge:
        where = base or manifest["config"]["init_from"]
        place = located(where, key="--base" if base else "init_from")
        tensors = _merged(adapter, model, tensors, place, run=index.run)
        adapter = NoAdapter()
    if pipeline is not None and adapter.partial:
        raise UserError(
            "--pipeline wants a whole network: add --merge to put the LoRA into its base"
        )
    around = None
    if pipeline is not None:
        around = pipeline_at(
            pipeline,
            transformer=model.stock_config()["_class_name"],
            pipelines=model.pipelines,
            key="--pipeline",
        )
    adapter.save(folder, model, tensors, dtype=DTYPES[dtype])
    if around is not None:
        complete(folder, around)
    card.write(
        folder,
        manifest=manifest,
        holds=adapter.contents(model),
        kind=KINDS[chosen],
        step=at,
        samples=index.progress["samples"],
        summary=_summary(run, at),
    )
    return folder


def _merged(
    adapter: Adapter, model: Model, tensors: Tensors, place: Path, *, run: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Add a LoRA to the base that it was trained on; `run` is what a checkpoint says of its run."""
    if not isinstance(adapter, LoRA):
        raise UserError("--merge is for LoRA runs; this one trained everything: leave it out")
    base = model.stored_weights(place, seed=run["seed"])
    if (found := fingerprint(model, base)) != run["init_from"]:
        raise UserError(
            f"{place} is not the base that this LoRA was trained on: {found} instead of "
            f"{run['init_from']}; give its place with --base"
        )
    return adapter.merged(model, base, tensors)


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
    parser.add_argument("--merge", action="store_true", help="add a LoRA to its base")
    parser.add_argument("--pipeline", help="make a whole pipeline with this one's other parts")
    parser.add_argument("--base", help="where that is now, as for init_from; where it was")
    words = vars(parser.parse_args())
    try:
        print(export(words.pop("run"), **words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
