"""Shards are written here: a set at once, or shard by shard.

Format version 2. A set is a folder of WebDataset tars `000000.tar`, ..., each with an index
`000000.index.json`, the null prompt's embedding `null.safetensors` (`text.0`, and `pooled.0` where
the family wants one) and `manifest.json`. In a tar each sample has two members: `KEY.safetensors`
with `latent` (C, H, W), and one unpadded `text.N` (tokens, width) for each caption, and where the
family wants them `pooled.N` (width,), `reference.N` (C, H, W) and `null.0` (tokens, width), the
null prompt beside the sample's own references; and `KEY.json` with `captions` and free fields. All
latents of a tar have one shape. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import safetensors.torch
from jaxtyping import Float
from torch import Tensor
from webdataset import TarWriter

from twinflow_train.batch import Embedding
from twinflow_train.data.index import Entry, row_of
from twinflow_train.data.manifest import NULL, About, Form, LatentShape, Manifest, ShardFile
from twinflow_train.data.sample import (
    Sample,
    fault_to_write,
    fields_of,
    form_of,
    tensors_of,
)
from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError
from twinflow_train.files import sha256, whole_file, whole_folder
from twinflow_train.place import CHUNK


def write_shards(
    folder: Path | str,
    samples: Iterable[Sample],
    *,
    null: Float[Tensor, "tokens width"] | Embedding,
    about: About,
    samples_per_shard: int = 500,
    overwrite: bool = False,
    latent_shape: LatentShape | None = None,
) -> ShardSet:
    """Write samples of one latent shape as a set, whole or not at all, and open it.

    The same samples give the same bytes. `null` is the null prompt's embedding. latent_shape: that
    of the first sample's latent, if it has one; needed where images are generated in training.

    Raises:
        UserError: the folder exists (unless `overwrite`), or a sample, which is named, is not
            finite, not like the first one, or has a key that cannot be a file name; or the null
            prompt is not embedded as samples are.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists already; remove it or choose another folder")
    first = next(stream := iter(samples), None)
    if first is None:
        raise UserError(f"{folder}: there are no samples to write")
    if latent_shape is None and first.latent is None:
        raise UserError(
            f"sample {first.key} has no latent: give write_shards the latent_shape of the images "
            "that training is to generate"
        )
    shape = latent_shape or tuple(first.image.shape)
    form, rest = form_of(first), chain([first], stream)
    embedding = null if isinstance(null, Embedding) else Embedding(null)
    if embedding.widths != (form.text_width, form.pooled_width):
        raise UserError(
            f"{folder}: the null prompt's embedding has widths {embedding.widths} (of a token, "
            f"pooled), the samples' have {(form.text_width, form.pooled_width)}"
        )
    with whole_folder(folder) as building:
        shards: list[ShardFile] = []
        while part := list(islice(rest, samples_per_shard)):
            path = building / f"{len(shards):06d}.tar"
            shards.append(write_shard(path, part, form, latent_shape=shape))
        null_sha256 = write_null(building, embedding)
        Manifest(about=about, form=form, null_sha256=null_sha256, shards=tuple(shards)).write(
            building
        )
    return ShardSet(folder)


def write_null(folder: Path, null: Float[Tensor, "tokens width"] | Embedding) -> str:
    """Write the null prompt's embedding into a set's folder and return its SHA-256."""
    embedding = null if isinstance(null, Embedding) else Embedding(null)
    tensors = {"text.0": embedding.tokens.contiguous()}
    if embedding.pooled is not None:
        tensors["pooled.0"] = embedding.pooled.contiguous()
    # Not save_file, whose files only their owner may read.
    found = safetensors.torch.save(tensors)
    with whole_file(folder / NULL) as unfinished:
        unfinished.write_bytes(found)
    return hashlib.sha256(found).hexdigest()


def write_shard(
    path: Path, samples: Sequence[Sample], form: Form, *, latent_shape: LatentShape
) -> ShardFile:
    """Write one shard and its index, each whole or not at all; the same samples, the same bytes.

    Raises:
        UserError: names a sample that is not finite, not of this form, or whose key cannot be a
            file name; so a bad one never gets into a set.
    """
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        raise UserError(f"{path.name}: two samples have the same key")
    for sample in samples:
        if fault := fault_to_write(sample, form, latent_shape):
            raise UserError(f"sample {sample.key}: {fault}")
    with whole_file(path) as unfinished:
        # An open file, because webdataset would run a path such as "pipe:..." as a command.
        # Written in large pieces: a page cache of small ones is read at half the speed.
        with (
            unfinished.open("wb", buffering=CHUNK) as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for sample in samples:
                tar.write(
                    {
                        "__key__": sample.key,
                        "safetensors": tensors_of(sample),
                        "json": fields_of(sample),
                    }
                )
        size, digest = unfinished.stat().st_size, sha256(unfinished)
        index = json.dumps([row_of(entry) for entry in entries(unfinished, samples)])
    found = ShardFile(
        file=path.name,
        samples=len(samples),
        bytes=size,
        sha256=digest,
        latent_shape=latent_shape,
        index_sha256=hashlib.sha256(index.encode()).hexdigest(),
    )
    with whole_file(path.with_name(found.index)) as unfinished:
        unfinished.write_text(index)
    return found


def entries(path: Path, samples: Sequence[Sample]) -> list[Entry]:
    """Find where each sample's members lie in a tar."""
    with tarfile.open(path, mode="r:") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    return [
        Entry(
            sample.key,
            *places[f"{sample.key}.safetensors"],
            *places[f"{sample.key}.json"],
            tuple(map(len, sample.texts)),
            0 if sample.null is None else len(sample.null),
        )
        for sample in samples
    ]
