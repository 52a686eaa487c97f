"""The manifest of a set of shards: what is in it and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.place import Place, cause

VERSION = 2
NAME = "manifest.json"
NULL = "null.safetensors"
HOW_TO_BUILD = "build shards with a recipe, for example `python data/digits.py`"
LatentShape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a reader of a shard set has to know about how it was made.

    encoder, revision: the repository of the encoders and the version of their weights.
    null_prompt: the text whose embedding stands for "no prompt".
    licence: a note on the licence of the pictures and captions.
    """

    encoder: str
    revision: str
    null_prompt: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class Form:
    """What all samples of a set have in common.

    text_width, pooled_width: of a token's embedding and of a pooled one; 0 is no pooled embedding.
    references: latents of reference images of each sample.
    """

    latent_dtype: str
    text_width: int
    text_dtype: str
    pooled_width: int = 0
    references: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One tar of a set: its name, samples, bytes and checksum, its latents' one shape.

    index_sha256: of the index beside it.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    latent_shape: LatentShape
    index_sha256: str

    @property
    def index(self) -> str:
        """The name of the index beside it."""
        return str(PurePosixPath(self.file).with_suffix(".index.json"))

    @staticmethod
    def of(said: Mapping[str, Any]) -> ShardFile:
        """Make it again from plain values; ValueError, TypeError or KeyError if it is none."""
        shard = ShardFile(**{**said, "latent_shape": tuple(said["latent_shape"])})
        if shard.file != PurePosixPath(shard.file).name or shard.samples < 1:
            raise ValueError(f"shard {shard}")
        return shard


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`."""

    version: int = VERSION
    about: About
    form: Form
    null_sha256: str
    shards: tuple[ShardFile, ...]

    @cached_property
    def buckets(self) -> dict[LatentShape, tuple[int, ...]]:
        """The numbers of the shards of each latent shape, shapes in their order of appearance."""
        found: dict[LatentShape, list[int]] = {}
        for number, shard in enumerate(self.shards):
            found.setdefault(shard.latent_shape, []).append(number)
        return {shape: tuple(numbers) for shape, numbers in found.items()}

    def write(self, folder: Path) -> None:
        """Write it into a folder, whole or not at all: the folder is a set then."""
        with whole_file(folder / NAME) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Place, *, option: str) -> Manifest:
        """Read a set's manifest; `option` is the config key that named the folder."""
        place = folder / NAME
        try:
            text = place.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            what = f"has no {NAME}" if folder.exists() else "does not exist"
            raise UserError(
                f"{option}: the folder of shards {folder} {what}; {HOW_TO_BUILD}"
            ) from error
        except OSError as error:
            raise UserError(f"{option}: {place} cannot be read: {cause(error)}") from error
        try:
            said = json.loads(text)
            version = said["version"]
            if version == VERSION:
                return Manifest._parse(said)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{place}: not a manifest of shards ({error!r}); build the set again"
            ) from error
        raise UserError(
            f"{place}: shard format version {version!r}, but this program reads version {VERSION}; "
            "build the set again with this version of the program"
        )

    @staticmethod
    def _parse(said: dict[str, Any]) -> Manifest:
        shards = tuple(map(ShardFile.of, said["shards"]))
        if not shards:
            raise ValueError("no shards")
        parts = {"about": About(**said["about"]), "form": Form(**said["form"]), "shards": shards}
        return Manifest(**said | parts)
