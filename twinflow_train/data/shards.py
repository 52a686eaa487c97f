"""Shards: folders of samples whose latents and text embeddings were computed beforehand.

Format version 1. A folder holds WebDataset tars `000000.tar`, ..., the null prompt's embedding
`null.safetensors` (tensor `text.0`) and `manifest.json`. In a tar each sample has two members:
`KEY.safetensors` with `latent` (C, H, W) and one unpadded `text.N` (tokens, width) for each
caption, and `KEY.json` with `captions` and free fields. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import safetensors.torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from webdataset import TarWriter

from twinflow_train.batch import Condition
from twinflow_train.data.manifest import VERSION, About, Form, Manifest, ShardFile
from twinflow_train.errors import UserError
from twinflow_train.files import sha256, whole_folder

KEY = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
"""Keys become file names: no dot, since WebDataset ends a key there, and no way out of a folder."""
LONGEST_KEY = 80
_REPAIR = "copy the file again or build the set again"


@dataclass(kw_only=True)
class Sample:
    """One image and its captions; a sample that was read has one caption, the chosen one.

    key: name in the data set; it becomes the names of the tar's members.
    latent: clean latent in the model's normalisation.
    texts: unpadded token embeddings, one for each caption.
    fields: anything else that JSON can hold, for example `label`.
    """

    key: str
    latent: Float[Tensor, "*chw"]
    texts: Sequence[Float[Tensor, "_ width"]]
    captions: Sequence[str]
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.texts or len(self.texts) != len(self.captions):
            raise UserError(
                f"sample {self.key}: {len(self.captions)} captions, {len(self.texts)} embeddings"
            )

    @property
    def text(self) -> Float[Tensor, "tokens width"]:
        """Return the first caption's token embedding."""
        return self.texts[0]

    @property
    def caption(self) -> str:
        """Return the first caption."""
        return self.captions[0]


@dataclass(frozen=True, kw_only=True)
class _OpenShard:
    """A mapped tar and where each member's bytes lie in it; keys are in the tar's order."""

    data: mmap.mmap
    keys: tuple[str, ...]
    places: Mapping[str, slice]


class ShardSet:
    """A folder of shards, read sample by sample in any order; safe to read from several threads.

    folder, option: the folder and the config key that named it, for messages.
    keep_open: shards whose index and mapping stay open (one file descriptor each).
    Raises UserError naming the file, and the sample, that cannot be used.
    """

    def __init__(
        self, folder: Path | str, *, option: str = "data.path", keep_open: int = 64
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder, option=option)
        present = set(os.listdir(self.folder))
        for file in [*(shard.file for shard in self.manifest.shards), "null.safetensors"]:
            if file not in present:
                raise UserError(f"{self.folder / file} is missing; {_REPAIR}")
        self.counts = tuple(shard.samples for shard in self.manifest.shards)
        self._ends = tuple(accumulate(self.counts))
        self._opened = lru_cache(maxsize=keep_open)(self._open)

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def null(self) -> Condition:
        """The null prompt as a float32 condition of one row."""
        path = self.folder / "null.safetensors"
        try:
            return Condition.pad([safetensors.torch.load_file(path)["text.0"].float()])
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}: not a null prompt ({error!r}); build the set again"
            ) from error

    def read(self, index: int, *, caption: int = 0) -> Sample:
        """Read sample `index`, showing only caption number `caption` modulo its captions."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        number = bisect_right(self._ends, index)
        shard = self._opened(number)
        key = shard.keys[index - (self._ends[number] - self.counts[number])]
        path = self.folder / self.manifest.shards[number].file
        try:
            tensors = safetensors.torch.load(shard.data[shard.places[f"{key}.safetensors"]])
            said: dict[str, Any] = json.loads(shard.data[shard.places[f"{key}.json"]])
            captions: list[str] = said.pop("captions")
            chosen = caption % len(captions)
            sample = Sample(
                key=key,
                latent=tensors["latent"],
                texts=(tensors[f"text.{chosen}"],),
                captions=(captions[chosen],),
                fields=said,
            )
        except (SafetensorError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"{path}: sample {key} cannot be read ({error!r}); {_REPAIR}"
            ) from error
        if fault := _fault(sample, self.manifest.form):
            raise UserError(f"{path}: sample {key}: {fault}; {_REPAIR}")
        return sample

    def verify(self) -> None:
        """Compare every file with its checksum, reading the whole set."""
        sums = {shard.file: shard.sha256 for shard in self.manifest.shards}
        for file, expected in (sums | {"null.safetensors": self.manifest.null_sha256}).items():
            path = self.folder / file
            if (found := sha256(path)) != expected:
                raise UserError(
                    f"{path}: SHA-256 is {found}, the manifest says {expected}; {_REPAIR}"
                )

    def _open(self, number: int) -> _OpenShard:
        """Map a shard and find its samples."""
        entry = self.manifest.shards[number]
        path = self.folder / entry.file
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.bytes:
                    raise UserError(
                        f"{path}: has {size} bytes, the manifest says {entry.bytes}; {_REPAIR}"
                    )
                places = _index(file, path)
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; {_REPAIR}") from error
        except tarfile.TarError as error:
            raise UserError(f"{path}: not a whole tar ({error}); {_REPAIR}") from error
        keys = tuple(dict.fromkeys(name.rpartition(".")[0] for name in places))
        for name in (f"{key}.{suffix}" for key in keys for suffix in ("safetensors", "json")):
            if name not in places:
                raise UserError(f"{path}: member {name} is missing; {_REPAIR}")
        if len(keys) != entry.samples:
            raise UserError(
                f"{path}: has {len(keys)} samples, the manifest says {entry.samples}; {_REPAIR}"
            )
        return _OpenShard(data=data, keys=keys, places=places)


def write_shards(
    folder: Path | str,
    samples: Iterable[Sample],
    *,
    null: Float[Tensor, "tokens width"],
    about: About,
    samples_per_shard: int = 500,
    overwrite: bool = False,
) -> ShardSet:
    """Write samples as a folder of shards, whole or not at all, and open it.

    The same samples give the same bytes. `null` is the null prompt's token embedding.
    Raises UserError if the folder exists (unless `overwrite`), and naming a sample that is not
    finite or not like the first one, or whose key cannot be a file name.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists already; remove it or choose another folder")
    first = next(stream := iter(samples), None)
    if first is None:
        raise UserError(f"{folder}: there are no samples to write")
    form, rest = _form(first), chain([first], stream)
    with whole_folder(folder) as building:
        shards: list[ShardFile] = []
        while part := list(islice(rest, samples_per_shard)):
            shards.append(_write_tar(building / f"{len(shards):06d}.tar", part, form))
        # Not save_file, whose files only their owner may read.
        null_bytes = safetensors.torch.save({"text.0": null.contiguous()})
        (building / "null.safetensors").write_bytes(null_bytes)
        manifest = Manifest(
            version=VERSION,
            about=about,
            form=form,
            null_sha256=hashlib.sha256(null_bytes).hexdigest(),
            shards=tuple(shards),
        )
        (building / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return ShardSet(folder)


def _write_tar(path: Path, samples: Sequence[Sample], form: Form) -> ShardFile:
    """Write one shard; samples are checked here, so that a bad one never gets into a set."""
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        raise UserError(f"{path.name}: two samples have the same key")
    # An open file, because webdataset would run a path such as "pipe:..." as a command.
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            if fault := _fault_to_write(sample, form):
                raise UserError(f"sample {sample.key}: {fault}")
            tensors = {f"text.{n}": text.contiguous() for n, text in enumerate(sample.texts)}
            tensors["latent"] = sample.latent.contiguous()
            said = {**sample.fields, "captions": list(sample.captions)}
            tar.write(
                {
                    "__key__": sample.key,
                    "safetensors": safetensors.torch.save(tensors),
                    "json": json.dumps(said, sort_keys=True, allow_nan=False).encode(),
                }
            )
    return ShardFile(
        file=path.name, samples=len(samples), bytes=path.stat().st_size, sha256=sha256(path)
    )


def _fault_to_write(sample: Sample, form: Form) -> str:
    """Say what forbids writing a sample; empty if nothing does."""
    if not KEY.fullmatch(sample.key) or len(sample.key) > LONGEST_KEY:
        return f"a key must match {KEY.pattern} and have at most {LONGEST_KEY} characters"
    if "captions" in sample.fields:
        return "`captions` cannot be a free field"
    for text in sample.texts:
        if fault := _fault(replace(sample, texts=(text,), captions=("",)), form):
            return fault
        if not bool(text.isfinite().all()):
            return "a text embedding is not finite"
    return ""


def _fault(sample: Sample, form: Form) -> str:
    """Say what makes a sample with one caption unusable; empty if nothing does."""
    if sample.text.ndim != 2 or len(sample.text) == 0:
        return f"a text embedding has shape {tuple(sample.text.shape)}, not (tokens, width)"
    if (found := _form(sample)) != form:
        return f"is {found}, the others are {form}"
    if not bool(sample.latent.isfinite().all()):
        return "the latent is not finite"
    return ""


def _form(sample: Sample) -> Form:
    """Describe a sample's latent and first text."""
    return Form(
        latent_shape=tuple(sample.latent.shape),
        latent_dtype=str(sample.latent.dtype).removeprefix("torch."),
        text_width=sample.text.shape[-1],
        text_dtype=str(sample.text.dtype).removeprefix("torch."),
    )


def _index(file: BinaryIO, path: Path) -> dict[str, slice]:
    """Find the bytes of each member of a tar; refuse names and kinds that no shard has."""
    places = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if _unsafe(member.name) or not member.isreg():
                raise UserError(
                    f"{path}: member {member.name!r} is not a plain file inside the tar"
                )
            if PurePosixPath(member.name).suffix not in (".safetensors", ".json"):
                raise UserError(
                    f"{path}: member {member.name!r}: only .safetensors and .json are read"
                )
            places[member.name] = slice(member.offset_data, member.offset_data + member.size)
    return places


def _unsafe(name: str) -> bool:
    """Tell whether a member's name could leave the folder that a tar is unpacked in."""
    return "\\" in name or any(part in ("", ".", "..") for part in name.split("/"))
