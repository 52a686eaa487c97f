"""GenEval and DPG-Bench: their prompts, pictures laid out for their scorers, and the scores."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image

from twinflow_train.errors import UserError
from twinflow_train.evaluate.suites import Prompt, Suite, json_of, lines_of
from twinflow_train.files import whole_file

RESULTS = "results.jsonl"
SCORES = "results.txt"
"""Where scorers are to write: beside the folder of pictures."""
OVERALL = "DPG-Bench score:"


@dataclass(kw_only=True)
class GenEval(Suite):
    """GenEval (Ghosh et al. 2023). prompts: its `evaluation_metadata.jsonl`.

    Pictures of prompt 7 are 00007/samples/0000.png to 0003.png, beside 00007/metadata.jsonl, which
    is the prompt's line. Its `evaluate_images.py` is to write RESULTS.
    """

    images: int = 4
    prompts: str = "???"

    def _read(self) -> list[Prompt]:
        found = []
        for number, line in enumerate(lines_of(Path(self.prompts))):
            said = json_of(line, f"suite.prompts: line {number + 1} of {self.prompts}")
            missing = [key for key in ("tag", "prompt", "include") if key not in said]
            if missing:
                raise UserError(
                    f"suite.prompts: line {number + 1} of {self.prompts} has no {missing[0]!r}; "
                    "GenEval's file is prompts/evaluation_metadata.jsonl of its repository"
                )
            found.append(
                Prompt(number=number, text=said["prompt"], name=f"{number:05d}", about=said)
            )
        return found

    def _source(self) -> str:
        return self.prompts

    def files(self, prompt: Prompt) -> list[Path]:
        """Name the files of a prompt's pictures."""
        return [Path(prompt.name, "samples", f"{image:04d}.png") for image in range(self.images)]

    def write(self, folder: Path, prompt: Prompt, pictures: Sequence[Image.Image]) -> None:
        """Write a prompt's line and its pictures."""
        with whole_file(folder / prompt.name / "metadata.jsonl") as unfinished:
            unfinished.write_text(json.dumps(prompt.about) + "\n")
        super().write(folder, prompt, pictures)

    def scored(self, folder: Path) -> dict[str, float]:
        """Read RESULTS: the share of correct pictures of each task, and their mean.

        That mean over tasks is what is published as GenEval's score.
        """
        path = folder.parent / RESULTS
        if not path.is_file():
            return {}
        tasks: dict[str, list[bool]] = defaultdict(list)
        for number, line in enumerate(lines_of(path), 1):
            said = json_of(line, f"line {number} of {path}")
            if not {"tag", "correct"} <= said.keys():
                raise UserError(f"line {number} of {path} is no result of GenEval's scorer")
            tasks[said["tag"]].append(bool(said["correct"]))
        shares = {tag: fmean(correct) for tag, correct in tasks.items()}
        if not shares:
            raise UserError(f"{path} is empty: score the pictures again, or remove it")
        return {"geneval": fmean(shares.values())} | {f"geneval/{k}": v for k, v in shares.items()}


@dataclass(kw_only=True)
class DPG(Suite):
    """DPG-Bench (ELLA; Hu et al. 2024). prompts: its folder of .txt files, or its dpg_bench.csv.

    Pictures of a prompt are one file, named as the prompt's and two by two in a square (one alone
    with images=1). Its `compute_dpg_bench.py` is to write SCORES, with --resolution the side of one
    picture and --pic-num `images`.
    """

    images: int = 4
    prompts: str = "???"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images not in (1, 4):
            raise UserError(f"suite.images is {self.images}; DPG-Bench takes 1 or 4 of a prompt")

    def _read(self) -> list[Prompt]:
        place = Path(self.prompts)
        texts = self._of_table(place) if place.is_file() else self._of_folder(place)
        return [
            Prompt(number=number, text=text, name=name)
            for number, (name, text) in enumerate(sorted(texts.items()))
        ]

    def _source(self) -> str:
        return self.prompts

    def _of_folder(self, folder: Path) -> dict[str, str]:
        if not folder.is_dir():
            raise UserError(
                f"suite.prompts: {folder} does not exist; DPG-Bench's are dpg_bench/prompts and "
                "dpg_bench/dpg_bench.csv of ELLA's repository"
            )
        return {path.stem: " ".join(lines_of(path)) for path in folder.glob("*.txt")}

    def _of_table(self, path: Path) -> dict[str, str]:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                if not {"item_id", "text"} <= set(rows.fieldnames or ()):
                    raise KeyError("item_id, text")
                return {row["item_id"]: row["text"].strip() for row in rows}
        except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
            raise UserError(
                f"suite.prompts: {path} is no dpg_bench.csv with item_id and text ({error!r})"
            ) from error

    def files(self, prompt: Prompt) -> list[Path]:
        """Name the file of a prompt's pictures."""
        return [Path(f"{prompt.name}.png")]

    def write(self, folder: Path, prompt: Prompt, pictures: Sequence[Image.Image]) -> None:
        """Write a prompt's pictures as one."""
        wide, high = pictures[0].size
        side = 2 if self.images == 4 else 1
        whole = Image.new("RGB", (side * wide, side * high))
        for number, picture in enumerate(pictures):
            whole.paste(picture, (number % side * wide, number // side * high))
        with whole_file(folder / self.files(prompt)[0]) as unfinished:
            whole.save(unfinished, format="PNG")

    def read(self, folder: Path, prompt: Prompt, image: int) -> Image.Image:
        """Cut one picture out of a prompt's file."""
        side = 2 if self.images == 4 else 1
        with Image.open(folder / self.files(prompt)[0]) as opened:
            wide, high = opened.width // side, opened.height // side
            left, top = image % side * wide, image // side * high
            return opened.convert("RGB").crop((left, top, left + wide, top + high))

    def scored(self, folder: Path) -> dict[str, float]:
        """Read the overall score that SCORES ends with, of 100."""
        path = folder.parent / SCORES
        if not path.is_file():
            return {}
        found = [line for line in lines_of(path) if line.startswith(OVERALL)]
        try:
            return {"dpg": float(found[-1].removeprefix(OVERALL))}
        except (IndexError, ValueError) as error:
            raise UserError(
                f"{path} has no line {OVERALL!r}: score the pictures again, or remove it"
            ) from error
