"""Files and folders are whole or not there, and others may read them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twinflow_train.files import save_tensors, sha256, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.txt"
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert not path.exists()
    assert (path.read_text(), names(path.parent)) == ("new", ["a.txt"])


def test_two_that_write_a_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("the first to begin, and the last to end")
        other.write_text("other")
    assert path.read_text() == "the first to begin, and the last to end"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        fail_in_file(path)
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def fail_in_file(path: Path) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "set"
    for name in ("old", "new"):
        with whole_folder(folder) as unfinished:
            (unfinished / name).write_text(name)
            assert not (folder / name).exists()
    assert (names(folder), names(folder.parent)) == (["new"], ["set"])


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "old").write_text("")
    with pytest.raises(KeyError):
        fail_in_folder(folder)
    assert (names(folder), names(tmp_path)) == (["old"], ["set"])


def fail_in_folder(folder: Path) -> None:
    with whole_folder(folder) as unfinished:
        (unfinished / "half").write_text("")
        raise KeyError


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    for left in ("set.partial", "set.retired"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("")
    with whole_folder(tmp_path / "set") as unfinished:
        assert names(unfinished) == []
    assert names(tmp_path) == ["set"]


def test_a_checksum_is_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5_000
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_tensors_are_readable_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(3)}, tmp_path / "a")
        assert os.umask(mask) == mask  # and it was left alone
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.ones(3))
