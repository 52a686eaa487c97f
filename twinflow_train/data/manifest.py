"""The manifest of a set of shards: what is in it and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from twinflow_train.data.ranges import persistently
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.place import Place, cause

VERSION = 2
NAME = "manifest.json"
NULL = "null.safetensors"
HOW_TO_BUILD = "build shards with a recipe, for example `python data/digits.py`"
TAR = re.compile(r"[\w-]+\.tar", re.ASCII)
"""What a shard's file is called."""
LatentShape = tuple[int, ...]
DTYPES = ("float32", "bfloat16", "float16")
"""The types that latents and embeddings may have."""


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

    latent_dtype: of latents and references; "none" where images are generated in training.
    text_width, pooled_width: of a token's embedding and of a pooled one; 0 is no pooled embedding.
    text_dtype: of both. references: latents of reference images of each sample. own_null: each
    sample has its own null prompt's embedding, one that depends on its reference images.
    """

    latent_dtype: str
    text_width: int
    text_dtype: str
    pooled_width: int = 0
    references: int = 0
    own_null: bool = False

    @property
    def has_latents(self) -> bool:
        """Whether samples have images: they have not in sets for image-free training."""
        return self.latent_dtype != "none"

    @staticmethod
    def of(said: Mapping[str, Any]) -> Form:
        """Make it again from plain values; ValueError, TypeError or KeyError if it is none."""
        form = Form(**said)
        numbers = (form.text_width, form.pooled_width, form.references)
        plain = all(type(number) is int and number >= 0 for number in numbers) and form.text_width
        plain = plain and type(form.own_null) is bool
        if not plain or form.text_dtype not in DTYPES or form.latent_dtype not in (*DTYPES, "none"):
            raise ValueError(f"form {form}")
        return form


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
        numbers = (shard.samples, shard.bytes, *shard.latent_shape)
        plain = all(type(number) is int and number > 0 for number in numbers)
        if not plain or len(shard.latent_shape) != 3 or not TAR.fullmatch(shard.file):
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
        said = asdict(self)
        if not self.form.own_null:
            del said["form"]["own_null"]  # so that older programs read what they can use
        with whole_file(folder / NAME) as unfinished:
            unfinished.write_text(json.dumps(said, indent=1) + "\n")

    @staticmethod
    def fetch(folder: Place, *, option: str, attempts: int) -> bytes:
        """Return the text of a set's manifest; `option` is the config key that named the folder."""
        place = folder / NAME
        try:
            return persistently(place.read, place, attempts)
        except (FileNotFoundError, NotADirectoryError) as error:
            what = f"has no {NAME}" if folder.exists() else "does not exist"
            raise UserError(
                f"{option}: the folder of shards {folder} {what}; {HOW_TO_BUILD}"
            ) from error
        except OSError as error:
            raise UserError(f"{option}: {place} cannot be read: {cause(error)}") from error

    @staticmethod
    def parse(text: bytes, place: Place) -> Manifest:
        """Read the text of the manifest at a place; UserError if it is none of this version."""
        try:
            said = json.loads(text)
            version = said["version"]
            if version == VERSION:
                return Manifest._parse(said)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
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
        if not shards or len({shard.file for shard in shards}) < len(shards):
            raise ValueError("no shards, or two of one name")
        parts = {"about": About(**said["about"]), "form": Form.of(said["form"]), "shards": shards}
        return Manifest(**said | parts)
