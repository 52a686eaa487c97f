"""What suites ask for, and that official scorers find pictures where they look for them."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import JUDGE, tiny
from twinflow_train.errors import UserError
from twinflow_train.evaluate.benchmarks import DPG, GenEval
from twinflow_train.evaluate.suites import Judged, Prompts, Suite

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}],
     "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 3}],
     "exclude": [{"class": "cup", "count": 4}], "prompt": "a photo of three cups"},
    {"tag": "color_attr", "include": [{"class": "cow", "count": 1, "color": "red"}],
     "prompt": "a photo of a red cow"},
]  # fmt: skip
COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)


def drawn(suite: Suite, folder: Path) -> None:
    """Draw every picture in a colour of its own."""
    for prompt in suite.asked():
        shown = [
            Image.new("RGB", (8, 6), (prompt.number * 40, image * 50, 9))
            for image in range(suite.images)
        ]
        suite.write(folder, prompt, shown)


def geneval(folder: Path) -> GenEval:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return GenEval(prompts=str(path))


def test_genevals_scorer_finds_each_prompt_with_its_pictures(tmp_path: Path) -> None:
    """The walk of its evaluate_images.py."""
    suite, folder = geneval(tmp_path), tmp_path / "pictures"
    drawn(suite, folder)
    found = {}
    for subfolder in os.listdir(folder):
        assert (folder / subfolder).is_dir()
        assert subfolder.isdigit()
        metadata = json.loads((folder / subfolder / "metadata.jsonl").read_text())
        for name in os.listdir(folder / subfolder / "samples"):
            assert re.match(r"\d+\.png", name)
            with Image.open(folder / subfolder / "samples" / name) as opened:
                found[subfolder, name] = (metadata, opened.convert("RGB").getpixel((0, 0)))
    assert found == {
        (f"{n:05d}", f"{k:04d}.png"): (line, (n * 40, k * 50, 9))
        for n, line in enumerate(LINES)
        for k in range(4)
    }
    assert suite.read(folder, suite.asked()[2], 3).getpixel((0, 0)) == (80, 150, 9)


def test_genevals_score_is_the_mean_of_its_tasks(tmp_path: Path) -> None:
    suite = geneval(tmp_path)
    correct = {"single_object": [True, True, True, True], "counting": [True, False, False, False]}
    rows = [
        {"filename": f"{tag}{n}.png", "tag": tag, "prompt": "p", "correct": one, "reason": "",
         "metadata": "{}", "details": "{}"}
        for tag, each in correct.items() for n, one in enumerate(each)
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert suite.scored(tmp_path / "pictures") == {
        "geneval": 0.625,
        "geneval/single_object": 1.0,
        "geneval/counting": 0.25,
    }
    assert suite.scored(tmp_path / "elsewhere" / "pictures") == {}
    (tmp_path / "results.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="no result of GenEval's scorer"):
        suite.scored(tmp_path / "pictures")


def dpg_folder(folder: Path) -> Path:
    prompts = folder / "prompts"
    prompts.mkdir()
    for name, text in {
        "partiprompts12": "two cats",
        "0": "a red\nfox",
        "COCOval7": "a vase",
    }.items():
        (prompts / f"{name}.txt").write_text(text + "\n")
    return prompts


@pytest.mark.parametrize("images", [1, 4])
def test_dpgs_scorer_finds_its_crops_by_the_prompts_name(tmp_path: Path, images: int) -> None:
    """The walk of its compute_dpg_bench.py, with --resolution 8 and --pic-num."""
    suite = DPG(prompts=str(dpg_folder(tmp_path)), images=images)
    folder, side = tmp_path / "pictures", 8
    for prompt in suite.asked():
        shown = [
            Image.new("RGB", (side, side), (prompt.number * 40, k * 50, 9)) for k in range(images)
        ]
        suite.write(folder, prompt, shown)
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:images]
    names = [prompt.name for prompt in suite.asked()]
    assert {file.split(".")[0] for file in os.listdir(folder)} == set(names)
    for number, name in enumerate(names):
        with Image.open(folder / f"{name}.png") as opened:
            for k, (x, y) in enumerate(corners):
                crop = opened.crop((x, y, x + side, y + side))
                assert crop.getextrema() == tuple((v, v) for v in (number * 40, k * 50, 9))
        assert suite.read(folder, suite.asked()[number], images - 1).getpixel((3, 3)) == (
            number * 40, (images - 1) * 50, 9
        )  # fmt: skip


def test_dpgs_prompts_are_the_same_from_its_folder_and_its_table(tmp_path: Path) -> None:
    folder = dpg_folder(tmp_path)
    path = tmp_path / "dpg_bench.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS.split(","))
        for name, text in (
            ("partiprompts12", "two cats"),
            ("0", "a red fox"),
            ("COCOval7", "a vase"),
        ):
            for question in (1, 2):
                rows.writerow([name, text, "", question, 0, "entity", "whole", "t", "Is it?"])
    by_table = [(p.name, p.text) for p in DPG(prompts=str(path)).asked()]
    assert by_table == [(p.name, p.text) for p in DPG(prompts=str(folder)).asked()]
    assert by_table == [("0", "a red fox"), ("COCOval7", "a vase"), ("partiprompts12", "two cats")]


def test_dpgs_score_is_the_last_line_of_its_results(tmp_path: Path) -> None:
    suite = DPG(prompts=str(dpg_folder(tmp_path)))
    (tmp_path / "results.txt").write_text(
        "x/0.png, 0.5, 1.0, 0.75\nModel: x\nL1 category scores:\n\tentity: 90.5\n"
        "Image path: x\nSave results to: y\nDPG-Bench score: 83.25\n"
    )
    assert suite.scored(tmp_path / "pictures") == {"dpg": 83.25}
    (tmp_path / "results.txt").write_text("x/0.png, 0.5\n")
    with pytest.raises(UserError, match="has no line 'DPG-Bench score:'"):
        suite.scored(tmp_path / "pictures")


def test_digits_are_asked_for_by_their_captions(tmp_path_factory: pytest.TempPathFactory) -> None:
    there = tiny(tmp_path_factory).folder
    suite = Judged(heldout=str(there / "heldout"), judge=str(there / JUDGE), limit=6)
    asked = suite.asked()
    assert [prompt.about["label"] for prompt in asked] == [0, 0, 0, 0, 1, 1]
    assert [prompt.text for prompt in asked[3:]] == ["a handwritten zero", "the digit one", "one"]


def test_prompts_of_ones_own_may_be_a_file_a_list_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a red fox\n\na blue vase\n")
    texts = [p.text for p in Prompts(prompts=str(tmp_path / "mine.txt")).asked()]
    assert texts == [p.text for p in Prompts(prompts=["a red fox", "a blue vase"]).asked()]
    assert [p.text for p in Prompts(prompts="a cup").asked()] == ["a cup"]
    assert [p.text for p in Prompts(prompts=texts, limit=1).asked()] == ["a red fox"]


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        (lambda f: Prompts(prompts=[]), "there is no prompt in"),
        (lambda f: Prompts(prompts=["a", " "]), "number 1 of .* is empty"),
        (lambda f: Prompts(prompts=3), "neither a text, nor a list"),
        (lambda f: Prompts(prompts=str(f / "no.txt")), "cannot be read"),
        (lambda f: GenEval(prompts=str(f / "no.jsonl")), "cannot be read"),
        (lambda f: GenEval(prompts=str(f / "other.jsonl")), "line 1 of .* has no 'tag'"),
        (lambda f: GenEval(prompts=str(f / "torn.jsonl")), "line 1 of .*: not JSON"),
        (lambda f: DPG(prompts=str(f / "nowhere")), "does not exist"),
        (lambda f: DPG(prompts=str(f / "other.jsonl")), "no dpg_bench.csv with item_id"),
        (lambda f: DPG(prompts="x", images=3), "takes 1 or 4"),
        (lambda f: Prompts(prompts="x", images=0), "suite.images is 0"),
        (lambda f: Prompts(prompts="x", limit=0), "suite.limit is 0"),
        (lambda f: Judged(judge=str(f / "none")), "there is no judge"),
    ],
)
def test_bad_prompts_are_one_clear_line(tmp_path: Path, suite: object, said: str) -> None:
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt"\n')
    assert callable(suite)
    with pytest.raises(UserError, match=said):
        suite(tmp_path).asked()
