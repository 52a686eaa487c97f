"""`python -m twinflow_train.checkpoint` says what a checkpoint is, and which file is damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.test_mishaps import cut, flip
from tests.checkpoint.tools import IDENTITY, RANK_FILE, Plainly
from twinflow_train.checkpoint.__main__ import main
from twinflow_train.checkpoint.inspecting import find, look
from twinflow_train.errors import UserError
from twinflow_train.place import Place

RUN = {
    "model": {"_type": "Net", "layers": 2},
    "objective": {"_type": "Loss", "guidance": 0.5, "shares": {"_type": "Shares", "fake": 1.0}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints."""
    Plainly.open(tmp_path / "run" / "checkpoints", identity=IDENTITY | RUN).save(1_000, 2_000)
    return tmp_path / "run"


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step-00002000"


def shown(capsys: pytest.CaptureFixture[str], *paths: object, bytewise: bool = True) -> str:
    """Return what is printed of whole checkpoints."""
    assert main([str(path) for path in paths], bytewise=bytewise) == 0
    return capsys.readouterr().out


def test_it_says_what_a_checkpoint_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, newest(folder)).splitlines() == [
        str(newest(folder)),
        "  step 2,000, 16,000 samples, 2,000 updates; format 1",
        "  model: Net (layers=2), 22 parameters",
        "  objective: Loss (guidance=0.5, shares={fake: 1.0})",
        "  model: 2 tensors, 88 bytes",
        "  average: 1 tensors, 60 bytes",
        "  exp_avg: 1 tensors, 60 bytes",
        "  written by 1 rank",
        "  whole: every byte was verified",
    ]


def test_a_checkpoint_a_folder_and_a_run_are_all_paths(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = shown(capsys, newest(folder))
    both = shown(capsys, folder)
    assert one in both
    assert both.count("whole: ") == 2
    assert shown(capsys, folder / "checkpoints") == both
    assert shown(capsys, f"file://{folder}").count("whole: ") == 2
    assert shown(capsys, newest(folder), newest(folder)) == 2 * one


def test_inspecting_reads_no_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(newest(folder) / RANK_FILE, -3)
    assert "whole, as far as headers tell" in shown(capsys, newest(folder), bytewise=False)
    assert main([str(newest(folder))], bytewise=True) == 1


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number": (lambda path: flip(path / RANK_FILE, -3), RANK_FILE),
    "a header": (lambda path: flip(path / RANK_FILE, 20), RANK_FILE),
    "a short file": (lambda path: cut(path / RANK_FILE), RANK_FILE),
    "no file": (lambda path: (path / RANK_FILE).unlink(), RANK_FILE),
    "the index": (lambda path: flip(path / "index.json", 30), "index.json"),
    "no index": (lambda path: (path / "index.json").unlink(), "index.json"),
    "no seal": (lambda path: (path / "COMPLETE").unlink(), "COMPLETE"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_is_damaged_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, file = DAMAGES[damage]
    change(newest(folder))
    assert main([str(folder)], bytewise=True) == 1
    out = capsys.readouterr().out
    assert out.count("  whole: ") == 1  # the other one
    (said,) = [line for line in out.splitlines() if "DAMAGED" in line]
    assert file in said
    assert "step-00002000" in said


@pytest.mark.parametrize("damage", ["a short file", "no file", "the index", "no seal"])
def test_much_is_seen_without_reading_all(folder: Path, damage: str) -> None:
    DAMAGES[damage][0](newest(folder))
    assert look(Place.of(newest(folder)), bytewise=False).fault != ""


def test_what_is_being_written_is_said_to_be(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(newest(folder), folder / "checkpoints" / "step-00002500.partial")
    assert "being written, or left behind" in shown(capsys, folder)


@pytest.mark.parametrize("name", ["", "nothing", "step-00000001", "file", "file/inside"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find(str(tmp_path / name))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "RUN"], 0, ""),
        (["inspect", "RUN/missing"], 2, "error: RUN/missing holds no checkpoint"),
        (["verify", "s3://bucket/run"], 2, "error: s3://bucket/run needs a package"),
        (["look", "RUN"], 2, "invalid choice: 'look'"),
    ],
)
def test_it_is_a_command(folder: Path, words: list[str], code: int, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "twinflow_train.checkpoint"]
        + [word.replace("RUN", str(folder)) for word in words],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == code
    assert said.replace("RUN", str(folder)) in ended.stderr
    assert bool(ended.stdout) == (code == 0)
    assert "Traceback" not in ended.stderr
