"""What an evaluation asks for, and where its pictures lie: Hydra's group `suite`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError
from twinflow_train.evals.judge import Judge
from twinflow_train.files import whole_file


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: its number, its text, the name of its files, and what else is known of it."""

    number: int
    text: str
    name: str
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Suite:
    """What every suite has. images: of each prompt. limit: take so many of the first prompts."""

    images: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"suite.images is {self.images}; it must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"suite.limit is {self.limit}; it must be at least 1, or null")

    @property
    def name(self) -> str:
        """Say which it is."""
        return type(self).__name__.lower()

    def asked(self) -> list[Prompt]:
        """Read the prompts; UserError if there are none, or one cannot be drawn."""
        found = self._read()[: self.limit]
        if not found:
            raise UserError(f"suite.prompts: there is no prompt in {self._source()}")
        for prompt in found:
            if not prompt.text.strip():
                raise UserError(
                    f"suite.prompts: number {prompt.number} of {self._source()} is empty"
                )
        return found

    def files(self, prompt: Prompt) -> list[Path]:
        """Name the files of a prompt's pictures, below the folder of pictures."""
        return [Path(f"{prompt.name}-{image}.png") for image in range(self.images)]

    def write(self, folder: Path, prompt: Prompt, pictures: Sequence[Image.Image]) -> None:
        """Write a prompt's pictures, each whole or not at all."""
        for file, picture in zip(self.files(prompt), pictures, strict=True):
            with whole_file(folder / file) as unfinished:
                picture.save(unfinished, format="PNG")

    def read(self, folder: Path, prompt: Prompt, image: int) -> Image.Image:
        """Read one of a prompt's pictures."""
        with Image.open(folder / self.files(prompt)[image]) as opened:
            return opened.convert("RGB")

    def scored(self, folder: Path) -> dict[str, float]:
        """Read what an official scorer wrote beside the folder of pictures, if it did."""
        return {}

    def _read(self) -> list[Prompt]:
        raise NotImplementedError

    def _source(self) -> str:
        raise NotImplementedError


@dataclass(kw_only=True)
class Prompts(Suite):
    """Prompts of one's own: a text, a list of them, or a file with one a line."""

    prompts: Any = "???"

    def _read(self) -> list[Prompt]:
        given = self.prompts
        if isinstance(given, str) and Path(given).suffix == ".txt":
            given = lines_of(Path(given))
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"suite.prompts: {given!r} is neither a text, nor a list of texts, nor a .txt file"
            )
        return [Prompt(number=n, text=t.strip(), name=f"{n:05d}") for n, t in enumerate(texts)]

    def _source(self) -> str:
        return repr(self.prompts)


@dataclass(kw_only=True)
class Judged(Suite):
    """A built-in set, digits or emoji: captions of held-out images, judged by its classifier.

    heldout: the shards. judge: its file. By default every held-out image is asked for once.
    """

    heldout: str = "datasets/digits/heldout"
    judge: str = "datasets/digits/judge.safetensors"

    @property
    def name(self) -> str:
        """Say which set it is."""
        return Path(self.heldout).parent.name

    def _read(self) -> list[Prompt]:
        Judge.load(self.judge)
        shards = ShardSet(self.heldout, option="suite.heldout")
        found = []
        for number in range(len(shards)):
            sample = shards.read(number, caption=number)
            if "label" not in sample.fields:
                raise UserError(f"suite.heldout: sample {sample.key} has no field `label`")
            about = {"label": int(sample.fields["label"])}
            found.append(
                Prompt(number=number, text=sample.caption, name=f"{number:05d}", about=about)
            )
        return found

    def _source(self) -> str:
        return self.heldout


def lines_of(path: Path) -> list[str]:
    """Read the lines of a file that are not blank; UserError if it cannot be read."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"suite.prompts: {path} cannot be read ({error})") from error


def json_of(line: str, where: str) -> dict[str, Any]:
    """Read one line as a JSON object; UserError if it is none."""
    try:
        said = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(said, dict):
        raise UserError(f"{where}: not a JSON object")
    return said
