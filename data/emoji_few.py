"""Build sixteen emoji in many poses: a set small enough to learn to draw on a CPU in an hour.

Writes OUT/train, OUT/heldout and, for evaluations, OUT/judge.safetensors; the pictures are those
of data/emoji.py. Run it as `python -m data.emoji_few`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.emoji import (
    NULL_PROMPT,
    SOURCES,
    STYLES,
    Picture,
    check_installed,
    counted,
    drawn,
    encoded,
    styles,
)
from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError
from twinflow_train.models.text import MiniLM, minilm_folder
from twinflow_train.rng import generator

CONCEPTS = (
    "red apple",
    "strawberry",
    "watermelon",
    "pineapple",
    "doughnut",
    "pizza",
    "sunflower",
    "cactus",
    "mushroom",
    "rainbow",
    "cat face",
    "panda",
    "frog",
    "penguin",
    "jack-o-lantern",
    "smiling face with sunglasses",
)
PHRASINGS = ("{name}, {style} emoji", "{name} emoji")
"""The second leaves the style open: a picture that is the mean of three styles is none of them."""

SIDE = 32
POSES = {"train": 60, "heldout": 10}
TURN, SMALLEST = 10.0, 0.85
"""The most that a picture is turned, in degrees, and the least that it is scaled to."""


def main(words: Sequence[str] | None = None) -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--out", type=Path, default=Path("datasets/emoji-few"), help="folder (%(default)s)")
    add("--poses", type=int, help="train on only so many poses of each picture, to try it")
    add("--force", action="store_true", help="build even what is there already")
    options = parser.parse_args(words)
    try:
        build(options.out, train=options.poses or POSES["train"], force=options.force)
        build_judge(options.out, force=options.force)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build(out: Path, *, train: int, force: bool) -> None:
    """Write both splits, keeping finished ones."""
    poses = {"train": range(train), "heldout": range(-POSES["heldout"], 0)}
    each = len(CONCEPTS) * len(STYLES)
    wanted = [
        name
        for name, some in poses.items()
        if force or not finished(out / name, samples=each * len(some))
    ]
    if not wanted:
        return
    source = SOURCES["styles"]
    check_installed(source.packages)
    pictures = chosen(styles(out / "packages"))
    encoder = MiniLM(minilm_folder())
    texts = sorted({caption for picture in pictures.values() for caption in captions(picture)})
    states = encoded(encoder, [*texts, NULL_PROMPT], name="captions")
    about = About(
        encoder=encoder.name,
        revision=encoder.revision,
        null_prompt=NULL_PROMPT,
        licence=f"{source.licence}; turned, scaled and drawn on white. See data/CREDITS.md.",
    )
    for name in wanted:
        made = counted(
            samples(pictures, states, poses[name]),
            total=len(pictures) * len(poses[name]),
            name=name,
        )
        write_shards(out / name, made, null=states[NULL_PROMPT], about=about, overwrite=True)


def build_judge(out: Path, *, force: bool) -> None:
    """Train the classifier that evaluations ask, keeping a finished one."""
    from twinflow_train.evals.judge import fit_judge

    path = out / "judge.safetensors"
    if path.exists() and not force:
        print(f"{path}: kept (--force trains it again)")
        return
    train, heldout = (ShardSet(out / split) for split in POSES)
    accuracy = fit_judge(train=train, heldout=heldout, path=path)
    print(f"judge: {accuracy:.1%} of the held-out emoji right")


def finished(folder: Path, *, samples: int) -> bool:
    """Tell whether a set is there and whole; one of other poses is an error."""
    if not (folder / "manifest.json").exists():
        return False
    if (found := len(ShardSet(folder))) != samples:
        raise UserError(
            f"{folder}: has {found} samples, not {samples}; choose another --out, or build it "
            "again with --force"
        )
    print(f"{folder}: kept {samples} samples (--force builds them again)")
    return True


def chosen(pictures: list[Picture]) -> dict[tuple[str, str], Picture]:
    """Take those of our names, by (name, style)."""
    found = {(picture.name, picture.style): picture for picture in pictures}
    return {(name, style): found[name, style] for name in CONCEPTS for style in STYLES}


def captions(picture: Picture) -> tuple[str, ...]:
    """Say what a picture shows, with its style and without."""
    return tuple(phrase.format(name=picture.name, style=picture.style) for phrase in PHRASINGS)


def samples(
    pictures: dict[tuple[str, str], Picture], states: dict[str, Tensor], poses: range
) -> Iterator[Sample]:
    """Make samples; names and styles take turns, so that the first of a set have all of them."""
    for pose in poses:
        for turn in range(len(STYLES)):
            for label, name in enumerate(CONCEPTS):
                style = list(STYLES)[(label + turn + pose) % len(STYLES)]
                picture = pictures[name, style]
                said = captions(picture)
                yield Sample(
                    key=f"{style}-{picture.code}-{pose % 1000:03d}",
                    latent=drawn(posed(picture, pose), size=SIDE),
                    texts=tuple(states[caption] for caption in said),
                    captions=said,
                    fields={"label": label, "name": name, "style": style},
                )


def posed(picture: Picture, pose: int) -> str:
    """Turn, scale and move a picture within its square, always the same way for a pose: SVG."""
    draws = torch.rand(4, generator=generator("pose", picture.code, picture.style, pose)).tolist()
    scale = SMALLEST + (1 - SMALLEST) * draws[0]
    angle = TURN * (2 * draws[1] - 1)
    right, down = (SIDE * (1 - scale) * (draw - 0.5) for draw in draws[2:])
    half = SIDE / 2
    inner = picture.svg.replace("<svg ", f'<svg width="{SIDE}" height="{SIDE}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}"><g transform="'
        f"translate({half + right:.3f} {half + down:.3f}) rotate({angle:.3f}) scale({scale:.4f}) "
        f'translate({-half:g} {-half:g})">{inner}</g></svg>'
    )


if __name__ == "__main__":
    main()
