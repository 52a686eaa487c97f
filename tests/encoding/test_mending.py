"""A start that failed binds nothing, and what was damaged since is made again or named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.encoding.jobs import pipeline, run, settings
from tests.encoding.tools import write_folder
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.folder import Folder, FolderReader
from twinflow_train.encoding.images import NoImages
from twinflow_train.encoding.plan import LEFT_OUT, PLAN
from twinflow_train.encoding.settings import KEEPING, SETTINGS, Preparation
from twinflow_train.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory)


@pytest.fixture
def prepared(tmp_path: Path, tiny: Path) -> Preparation:
    source = write_folder(tmp_path / "source", range(5))
    return settings(tmp_path / "set", tiny, source=Folder(path=str(source)))


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a set but the workers' own."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# What fails before there is a plan


def test_a_source_that_was_misspelt_can_be_corrected(prepared: Preparation) -> None:
    wrong = replace(prepared, source=Folder(path=prepared.source.path + "s"))
    with pytest.raises(UserError, match=r"sources does not exist"):
        run(wrong)
    assert not (prepared.keeping / SETTINGS).exists()
    assert run(prepared).samples == 5
    with pytest.raises(UserError, match=r"begun with other settings: source\.path was"):
        run(wrong)


def test_sizes_that_do_not_fit_can_be_corrected(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    wrong = settings(
        tmp_path / "set", tiny, source=Captions(path=str(tmp_path / "prompts.txt")),
        images=NoImages(sizes=[[65, 64]]),
    )  # fmt: skip
    with pytest.raises(UserError, match="65x64 is not a multiple"):
        run(wrong)
    assert run(replace(wrong, images=NoImages(sizes=[[64, 64]]))).samples == 2


def test_two_who_plan_with_other_settings_do_not_both_get_their_way(
    prepared: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes its plan while this one looks for sizes."""
    measured: list[Folder] = []
    measure = Folder.open

    def late(source: Folder) -> FolderReader:
        if not measured:
            measured.append(source)
            run(replace(prepared, samples_per_shard=2))
        return measure(source)

    monkeypatch.setattr(Folder, "open", late)
    with pytest.raises(UserError, match="samples_per_shard was 2, now 3"):
        run(prepared)
    assert run(replace(prepared, samples_per_shard=2)).shards == 0


@pytest.mark.parametrize("written", ["{}/", "{}/../source", "source"])
def test_a_source_may_be_written_in_other_words(
    prepared: Preparation, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prepared.source.path
    monkeypatch.chdir(Path(path).parent)
    run(prepared)
    assert run(replace(prepared, source=Folder(path=written.format(path)))).left == 0


def test_settings_that_hold_a_path_as_it_was_given_are_the_same(
    prepared: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prepared)
    monkeypatch.chdir(Path(prepared.source.path).parent)
    said = prepared.keeping / SETTINGS
    said.write_text(said.read_text().replace(prepared.source.path, "source/"))
    assert run(prepared).left == 0


# What is damaged later


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "shards"),
    [
        ("000001.tar", Path.unlink, 1),
        ("000001.tar", cut, 1),
        ("000001.index.json", Path.unlink, 1),
        (f"{KEEPING}/000001.json", lambda path: path.write_text("{"), 1),
        (f"{KEEPING}/000001.json", lambda path: path.write_text("[]"), 1),
        ("null.safetensors", Path.unlink, 0),
        ("null.safetensors", cut, 0),
        ("manifest.json", lambda path: path.write_text("{"), 0),
        ("skipped.jsonl", Path.unlink, 0),
    ],
)  # fmt: skip
def test_the_same_command_makes_what_is_missing(
    prepared: Preparation, name: str, damage: Callable[[Path], object], shards: int
) -> None:
    run(prepared)
    folder = Path(prepared.folder)
    before = contents(folder)
    damage(folder / name)
    assert run(prepared).shards == shards
    assert contents(folder) == before
    ShardSet(folder).verify()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (LEFT_OUT, None, r"left_out\.jsonl, .* cannot be read .*leave an empty file of that name"),
        (LEFT_OUT, "{", r"left_out\.jsonl, .* cannot be read .*bring it back"),
        (SETTINGS, "{", r"settings\.json is damaged .*prepare into another folder="),
        (SETTINGS, "[1]", r"settings\.json is damaged"),
    ],
)
def test_what_cannot_be_made_again_is_one_line(
    prepared: Preparation, name: str, text: str | None, said: str
) -> None:
    run(prepared)
    path = prepared.keeping / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        run(prepared)


def test_a_damaged_plan_is_one_line(prepared: Preparation) -> None:
    run(prepared, 0, 2)
    path = prepared.keeping / PLAN
    path.write_text("{\n" * len(path.read_text().splitlines()))
    with pytest.raises(UserError, match=r"plan\.jsonl is damaged in line 2 .*another folder="):
        run(prepared)
