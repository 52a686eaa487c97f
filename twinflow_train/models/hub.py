"""Weights by name: folders here, and repositories of the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from twinflow_train.errors import UserError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TRANSFORMER = ("model_index.json", "transformer/*")
"""What is needed of a pipeline's repository to start from its transformer."""


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


def complete(folder: Path, where: str, *, key: str) -> None:
    """Put the other parts of a pipeline beside a transformer: VAE, text encoder, scheduler, ...

    Files are linked where they lie on the same disk, else copied. where: the pipeline's folder, or
    REPOSITORY or REPOSITORY@REVISION.

    Raises:
        UserError: it is no pipeline, or cannot be had.
    """
    source, (name, _, revision) = Path(where), where.partition("@")
    if not source.exists() and REPOSITORY.fullmatch(name):
        source = download(name, revision=revision or None, patterns=("*.json", "*/*"), key=key)
    if not (source / "model_index.json").is_file():
        raise UserError(f"{key}: {where} is no diffusers pipeline, it has no model_index.json")
    for file in sorted(source.rglob("*")):
        part = file.relative_to(source)
        if not file.is_file() or part.parts[0] == "transformer" or part.suffix == ".md":
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
