"""The manifest of a folder of shards: what is in it and how it was made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from twinflow_train.errors import UserError

VERSION = 1
HOW_TO_BUILD = "build shards with a recipe, for example `python data/digits.py`"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a reader of a shard set has to know about how it was made.

    encoder, revision: the text encoder and the version of its weights.
    null_prompt: the text whose embedding stands for "no prompt".
    licence: a note on the licence of the pictures and captions.
    """

    encoder: str
    revision: str
    null_prompt: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class Form:
    """What all samples of a set have in common."""

    latent_shape: tuple[int, ...]
    latent_dtype: str
    text_width: int
    text_dtype: str


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One tar of a set: its name, its number of samples, its size and its checksum."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`."""

    version: int
    about: About
    form: Form
    null_sha256: str
    shards: tuple[ShardFile, ...]

    @staticmethod
    def read(folder: Path, *, option: str) -> Manifest:
        """Read a folder's manifest; `option` is the config key that named the folder."""
        path = folder / "manifest.json"
        if not path.is_file():
            what = "has no manifest.json" if folder.is_dir() else "does not exist"
            raise UserError(f"{option}: the folder of shards {folder} {what}; {HOW_TO_BUILD}")
        try:
            said = json.loads(path.read_bytes())
            version = said["version"]
            if version == VERSION:
                return Manifest._parse(said)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: not a manifest of shards ({error!r}); build the set again"
            ) from error
        raise UserError(
            f"{path}: shard format version {version!r}, but this program reads version {VERSION}; "
            "build the set again with this version of the program"
        )

    @staticmethod
    def _parse(said: dict[str, Any]) -> Manifest:
        shards = tuple(ShardFile(**shard) for shard in said["shards"])
        for shard in shards:
            if shard.file != PurePosixPath(shard.file).name or shard.samples < 1:
                raise ValueError(f"shard {shard}")
        if not shards:
            raise ValueError("no shards")
        form = said["form"] | {"latent_shape": tuple(said["form"]["latent_shape"])}
        return Manifest(
            **said | {"about": About(**said["about"]), "form": Form(**form), "shards": shards}
        )
