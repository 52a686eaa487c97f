"""The manifest of a set of shards: what is in it and how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
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
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "none": 0}
"""Bytes of a number of each type."""
HEADERS = 1024
"""Bytes of the headers in a tar that belong to one sample."""
LARGEST, WIDEST, MOST_REFERENCES = 1 << 26, 1 << 16, 64
"""Numbers in a latent or samples in a tar; numbers in an embedding; references: what more a set
claims to have is not believed, since memory is taken by these claims."""


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

    def size(self, latent_shape: LatentShape, tokens: Sequence[int], null: int = 0) -> int:
        """Return the bytes of a sample's tensors; tokens: of each caption, null: of its own."""
        latents = math.prod(latent_shape) * (1 + self.references) * ITEM[self.latent_dtype]
        texts = (sum(tokens) + null) * self.text_width + len(tokens) * self.pooled_width
        return latents + texts * ITEM[self.text_dtype]

    @staticmethod
    def of(said: Mapping[str, Any]) -> Form:
        """Make it again from plain values; ValueError, TypeError or KeyError if it is none."""
        form = Form(**said)
        bounds = (WIDEST, WIDEST, MOST_REFERENCES if form.has_latents else 0)
        numbers = zip((form.text_width, form.pooled_width, form.references), bounds, strict=True)
        plain = all(type(number) is int and 0 <= number <= most for number, most in numbers)
        plain = plain and form.text_width > 0 and type(form.own_null) is bool
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
        plain = plain and max(shard.samples, math.prod(shard.latent_shape)) <= LARGEST
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
        about, form = About(**said["about"]), Form.of(said["form"])
        if not all(isinstance(each, str) for each in asdict(about).values()):
            raise ValueError(f"{about}")
        for shard in shards:
            least = shard.samples * (HEADERS + form.size(shard.latent_shape, [1]))
            if shard.bytes < least:
                raise ValueError(f"{shard.file} has {shard.bytes} bytes, its samples {least}")
        return Manifest(**said | {"about": about, "form": form, "shards": shards})
