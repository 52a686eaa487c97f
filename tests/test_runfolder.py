"""A run's folder: made, locked, refused where it cannot be, and described without secrets."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import spawn
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.runfolder import read_manifest, run_folder, set_aside, write_manifest

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def test_a_folder_is_made_with_all_above_it(tmp_path: Path) -> None:
    with run_folder(str(tmp_path / "a" / "b c"), ALONE) as folder:
        assert folder == tmp_path / "a" / "b c"
        assert folder.is_dir()


def test_a_folder_is_for_one_job_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    with (
        run_folder(path, ALONE),
        pytest.raises(UserError, match=r"run: another job is running in it"),
        run_folder(path, ALONE),
    ):
        raise AssertionError("two jobs in one folder")
    with run_folder(path, ALONE):  # free again
        pass


def test_another_spelling_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        run_folder(str(tmp_path / "run"), ALONE),
        pytest.raises(UserError, match="another job"),
        run_folder(str(tmp_path / "link" / ".." / "run"), ALONE),
    ):
        raise AssertionError("two jobs in one folder")


@pytest.mark.parametrize("inner", ["", "/deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, inner: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"folder .*file.*cannot be written.*choose another folder="),
        run_folder(f"{tmp_path}/file{inner}", ALONE),
    ):
        raise AssertionError("a file was taken for a folder")


def test_a_full_disk_is_told_at_the_start(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with (
            pytest.raises(UserError, match=r"run: it cannot be written \(File too large\)"),
            run_folder(str(tmp_path / "run"), ALONE),
        ):
            raise AssertionError("there is no room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with run_folder(str(tmp_path / "run"), ALONE) as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_folder_that_nothing_can_be_written_into_is_named() -> None:
    # Also the superuser cannot make files here.
    with (
        pytest.raises(UserError, match="cannot be written"),
        run_folder("/proc/self/fd", ALONE),
    ):
        raise AssertionError("a lock was written among the open files")


def enter(world: World, path: str) -> str:
    try:
        with run_folder(path, world) as folder:
            return str(folder)
    except UserError as error:
        return f"refused: {error}"


def test_all_ranks_are_refused_alike(tmp_path: Path) -> None:
    assert spawn(enter, 2, str(tmp_path / "run")) == [str(tmp_path / "run")] * 2
    with run_folder(str(tmp_path / "run"), ALONE):
        first, second = spawn(enter, 2, str(tmp_path / "run"))
    assert first == second
    assert "another job" in first


def test_what_was_there_is_set_aside_and_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "x").write_text(str(number))
        (tmp_path / ".lock").write_text("")
        set_aside(tmp_path, ALONE)
        assert (tmp_path / f"before-{number}" / "checkpoints" / "x").read_text() == str(number)
    set_aside(tmp_path, ALONE)  # nothing to move
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "before-1", "before-2"}


def test_aside_goes_nothing_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "before-2").mkdir()  # the user removed before-1
    (tmp_path / "metrics.jsonl").write_text("new")
    set_aside(tmp_path, ALONE)
    (moved,) = tmp_path.glob("before-*/metrics.jsonl")
    assert moved.read_text() == "new"


def test_a_manifest_says_what_made_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://user:word@host/x?token=abc"
    odd = '\'; $(touch made) `x` ${seed} "q" \\ \n\u00e4'
    monkeypatch.setattr(sys, "argv", ["train", f"data.path={url}", odd])
    write_manifest(
        tmp_path,
        {"data": {"path": url, "list": [url]}, "name": odd},
        f"url: {url}\n",
        [{"licence": "CC-BY"}],
        ALONE,
    )
    assert read_manifest(tmp_path)["data"] == [{"licence": "CC-BY"}]
    text = (tmp_path / "manifest.json").read_text()
    said = json.loads(text)
    hidden = "https://***@host/x?token=***"
    assert said["config"] == {"data": {"path": hidden, "list": [hidden]}, "name": odd}
    assert said["command"] == ["train", f"data.path={hidden}", odd]
    assert (said["ranks"], said["device"]) == (1, "cpu")
    assert torch.__version__.startswith(said["libraries"]["torch"].partition("+")[0])
    assert "word" not in text
    assert (tmp_path / "config.yaml").read_text() == f"url: {hidden}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "manifest.json"]


def test_only_the_main_process_writes_the_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, {}, "", [], World(rank=1, size=2, device=torch.device("cpu")))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json is missing: give a run's folder"):
        read_manifest(tmp_path)
