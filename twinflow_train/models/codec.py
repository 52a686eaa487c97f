"""What turns pictures and prompts into what shards hold, and the pipeline folders it comes from."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.errors import UserError, listed
from twinflow_train.files import sha256
from twinflow_train.models.hub import REPOSITORY, download

VARIANTS = (None, "bf16", "fp16")
"""What repositories call files of other types; the plain ones are taken where they are there."""
Parts = Mapping[str, str | tuple[str, ...]]
"""The class of each part of a pipeline that is needed, or the several that will do."""


@dataclass(frozen=True)
class Length:
    """How many tokens a prompt has, and the most that its text encoder is shown."""

    tokens: int
    most: int


class Codec(ABC):
    """A family's picture and prompt encoders, loaded.

    null_prompt: the prompt that stands for "no prompt".
    multiple: pixels that heights and widths must be multiples of.
    text_width: width of a token's embedding; pooled_width: of a prompt's pooled one, 0 for none.
    usual_size: height and width in pixels that the model was made to draw.
    """

    null_prompt: str
    multiple: int
    usual_size: int = 1024
    text_width: int
    pooled_width: int = 0

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latent of a picture of this size in pixels."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c hl wl"]:
        """Turn pictures in [-1, 1] into normalised latents: their mean, in float32."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "b c hl wl"]) -> Float[Tensor, "b 3 h w"]:
        """Turn normalised latents into pictures in [-1, 1], in float32."""

    @abstractmethod
    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time."""

    def length(self, prompt: str) -> Length | None:
        """Count a prompt's tokens: with more than the most its end is lost. None: none is."""
        return None


class EditCodec(Codec):
    """A codec of a family for editing, whose prompts are about reference images."""

    @abstractmethod
    def embed_edits(
        self, prompts: Sequence[str], references: Sequence[UInt8[Tensor, "3 _ _"]]
    ) -> list[Embedding]:
        """Return the embedding of each prompt about the same reference images."""


@dataclass(kw_only=True)
class Encoders(ABC):
    """Where a codec's weights are: the `encoders` group of the configuration.

    path: a diffusers pipeline folder, or a repository of the Hugging Face hub.
    revision: the repository's branch, tag or commit; null is its main branch.
    edits: whether prompts are about reference images, and the codec is an `EditCodec`.
    """

    null_prompt: ClassVar[str]
    edits: ClassVar[bool] = False

    path: str = "???"
    revision: str | None = None

    @abstractmethod
    def find(self) -> PipelineFolder:
        """Find the weights; UserError if they are missing, not whole or of another family."""

    @abstractmethod
    def open(self, folder: PipelineFolder, device: torch.device) -> Codec:
        """Load the codec from what `find` found; UserError if it is damaged."""


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's folder that holds the parts a codec needs.

    name: the repository's, or the folder's own. commit: of the repository, None for a folder that
    was given. parts: their names. variant: of the weight files that are there, see VARIANTS.
    """

    path: Path
    name: str
    commit: str | None
    parts: tuple[str, ...]
    variant: str | None = None

    @cached_property
    def revision(self) -> str:
        """Identify the weights: the repository's commit, or a SHA-256 over all files used."""
        if self.commit is not None:
            return self.commit
        files = sorted(
            file for part in self.parts for file in (self.path / part).rglob("*") if file.is_file()
        )
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(sha256, files))
        said = [[str(f.relative_to(self.path)), s] for f, s in zip(files, sums, strict=True)]
        return f"sha256:{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"


def find_pipeline(
    path: str, *, revision: str | None, parts: Parts, option: str = "encoders"
) -> PipelineFolder:
    """Find a pipeline's folder here or in the hub's cache, or download what is needed of it.

    Raises:
        UserError: it is missing, not whole, or its parts are of other classes.
    """
    folder, commit = Path(path), None
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"{option}.revision is {revision}, but {option}.path = {path} is a folder: leave "
                "the revision out, or give a repository of the Hugging Face hub"
            )
    elif REPOSITORY.fullmatch(path):
        patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
        folder = download(path, revision=revision, patterns=patterns, key=f"{option}.path")
        commit = folder.name
    else:
        raise UserError(f"{option}.path: the pipeline folder {path} does not exist")
    variant = next((v for v in VARIANTS if not any(_missing(folder, parts, v))), None)
    if missing := list(_missing(folder, parts, variant)):
        raise UserError(
            f"{option}.path: {path} is not a whole pipeline, it lacks {listed(missing)}; download "
            f"{_patterns(parts)} of the repository into it"
        )
    _check_classes(folder, parts, path=path, option=option)
    name = folder.resolve().name if commit is None else path
    return PipelineFolder(folder, name, commit, tuple(parts), variant)


def _patterns(parts: Parts) -> str:
    return " ".join(["model_index.json", *(f"'{part}/*'" for part in parts)])


def _missing(folder: Path, parts: Parts, variant: str | None) -> Iterator[str]:
    """Name the files that a whole pipeline would have and this folder has not.

    Parts that have no files of the variant may have plain ones.
    """
    if not (folder / "model_index.json").is_file():
        yield "model_index.json"
    for part in parts:
        here = folder / part
        if part.startswith(("tokenizer", "processor")):
            whole = any((here / one).is_file() for one in ("tokenizer.json", "spiece.model"))
            files = ["tokenizer_config.json", *([] if whole else ["vocab.json", "merges.txt"])]
            if part == "processor" and not (here / "processor_config.json").is_file():
                files.append("preprocessor_config.json")  # as older releases call it
        else:
            name = "diffusion_pytorch_model" if part == "vae" else "model"
            found = weight_files(here, name, variant)
            if variant and not all((here / file).is_file() for file in found):
                found = weight_files(here, name, None)
            files = ["config.json", *found]
        yield from (f"{part}/{file}" for file in files if not (here / file).is_file())


def weight_files(folder: Path, name: str, variant: str | None) -> list[str]:
    """List the files that hold a part's weights: those that its index names, if there is one."""
    dotted = f".{variant}" if variant else ""
    index = folder / f"{name}.safetensors.index{dotted}.json"
    if not index.is_file():
        return [f"{name}{dotted}.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}); download it again") from error


def _check_classes(folder: Path, parts: Parts, *, path: str, option: str) -> None:
    index = folder / "model_index.json"
    try:
        said = json.loads(index.read_text())
        found = {part: said[part][-1] for part in parts}
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{index} is damaged ({error!r}); download it again") from error
    for part, wanted in parts.items():
        allowed = (wanted,) if isinstance(wanted, str) else wanted
        if found[part] not in allowed:
            raise UserError(
                f"{option}.path: the {part} of {path} is {found[part]}, not "
                f"{' or '.join(allowed)}: choose the {option}= of its family"
            )
