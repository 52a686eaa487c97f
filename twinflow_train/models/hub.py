"""Weights by name: folders here, and repositories of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from twinflow_train.errors import UserError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TRANSFORMER = ("model_index.json", "transformer/*", "connector/*", "sampler.json", "model.json")
"""What is needed of a pipeline's repository, or of a published export, for its transformer."""


def download(repository: str, *, revision: str | None, patterns: Sequence[str], key: str) -> Path:
    """Return the hub's snapshot of some files of a repository, from its cache where it is there.

    Raises:
        UserError: it cannot be had; `key` of the configuration named it.
    """
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        wanted = f" --revision {revision}" if revision else ""
        files = " ".join(f"'{each}'" if "*" in each else each for each in patterns)
        raise UserError(
            f"{key}: {repository} is neither a folder here, nor in the Hugging Face cache, nor to "
            f"be had from the hub ({type(error).__name__}); where there is a network, run `hf "
            f"download {repository} {files}{wanted} --local-dir FOLDER`, copy FOLDER here and give "
            f"{key}=FOLDER"
        ) from error
    return Path(found)


def pipeline_at(where: str, *, transformer: object, pipelines: Sequence[str], key: str) -> Path:
    """Find a whole pipeline: its folder, REPOSITORY or REPOSITORY@REVISION.

    transformer: the class that its transformer has to be of. pipelines: the classes that it may be
    of itself; empty for any.

    Raises:
        UserError: it is no pipeline, cannot be had, or is another family's.
    """
    source, (name, _, revision) = Path(where), where.partition("@")
    if not source.exists() and REPOSITORY.fullmatch(name):
        source = download(name, revision=revision or None, patterns=("*.json", "*/*"), key=key)
    said = read_index(source)
    if not said:
        raise UserError(f"{key}: {where} is no diffusers pipeline, it has no model_index.json")
    kind, part = said.get("_class_name"), said.get("transformer", [None])
    if part[-1] != transformer or (pipelines and kind not in pipelines):
        raise UserError(
            f"{key}: {where} is a {kind} around a {part[-1]}, the weights are a {transformer}'s "
            f"for {' or '.join(pipelines) or 'its own'}; give the pipeline of their base"
        )
    return source


def read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline's model_index.json; empty if there is none, UserError if it is damaged."""
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); get it anew") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object; get it anew")
    return found


def complete(folder: Path, source: Path) -> None:
    """Put the other parts of a pipeline beside a transformer: VAE, text encoder, scheduler, ...

    Files are linked where they lie on the same disk, else copied.
    """
    for file in sorted(source.rglob("*")):
        part = file.relative_to(source)
        hidden = any(name.startswith(".") for name in part.parts)
        if not file.is_file() or hidden or part.parts[0] == "transformer" or part.suffix == ".md":
            continue
        target = folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(file.resolve(), target)
            continue
        shutil.copyfile(file, target)


def located(where: str, *, key: str = "init_from") -> Path:
    """Find the folder of a transformer's weights: a folder, REPOSITORY or REPOSITORY@REVISION.

    Raises:
        UserError: it is neither here nor to be had.
    """
    folder, (name, _, revision) = Path(where), where.partition("@")
    if folder.exists() or not REPOSITORY.fullmatch(name):
        return folder
    return download(name, revision=revision or None, patterns=TRANSFORMER, key=key)
