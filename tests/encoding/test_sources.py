"""What each source finds, in which order, and what it says of what cannot be used."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.encoding.tools import encoded, picture, write_folder, write_parquet, write_tar
from twinflow_train.encoding import parquet
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.folder import Folder
from twinflow_train.encoding.parquet import Parquet
from twinflow_train.encoding.pictures import Size, Unusable
from twinflow_train.encoding.sources import Content, Item, Reader, Source
from twinflow_train.encoding.tars import HEADER, WebDataset
from twinflow_train.errors import UserError

PNG = encoded(picture(0, 40, 60))


def reason(reader: Reader, where: tuple[str | int, ...], *, measured: bool = True) -> str:
    """Return why an item is left out, when it is read and, if so, already when it is measured."""
    with pytest.raises(Unusable) as error:
        reader.read(where)
    if measured:
        with pytest.raises(Unusable) as first:
            reader.measure(where)
        assert str(first.value) == str(error.value)
    return str(error.value)


def names(reader: Reader) -> list[str]:
    return [Item(number=0, where=where).name for where in reader.find()]


# Folders


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write_folder(tmp_path, range(7))
    (tmp_path / "even" / "notes.md").write_text("no picture")
    (tmp_path / "A.JPG").write_bytes(encoded(picture(8), "JPEG"))
    (tmp_path / "A.txt").write_text("\ufefffirst\r\n\r\n  second \r\n", encoding="utf-8")
    reader = Folder(path=str(tmp_path)).open()
    found = list(reader.find())
    assert names(reader) == [
        "A.JPG", *(f"even/{n:03d}.png" for n in (0, 2, 4, 6)),
        *(f"odd/{n:03d}.png" for n in (1, 3, 5)),
    ]  # fmt: skip
    assert reader.read(found[0]).captions == ("first", "second")
    third = tmp_path / "odd" / "003.png"
    assert reader.read(("odd/003.png",)) == Content(
        captions=("picture 3", "the image of 3"), picture=third.read_bytes()
    )
    assert reader.measure(("odd/003.png",)) == Size(70, 64)


def test_what_a_folder_lacks_is_said_of_each_picture(tmp_path: Path) -> None:
    for name in ("alone", "empty", "latin", "broken"):
        (tmp_path / f"{name}.png").write_bytes(PNG)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "broken.txt").write_text("a caption")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    reader = Folder(path=str(tmp_path)).open()
    assert reason(reader, ("alone.png",)) == "there is no alone.txt beside it"
    assert reason(reader, ("empty.png",), measured=False) == "it has no caption"
    assert reason(reader, ("latin.png",), measured=False) == "its captions are not UTF-8"
    with pytest.raises(Unusable, match="not a picture that can be read"):
        reader.measure(("broken.png",))
    (tmp_path / "alone.txt").write_text("later")
    (tmp_path / "alone.png").unlink()
    assert reason(reader, ("alone.png",), measured=False).startswith("it cannot be read (No such")


def test_captions_may_have_a_name_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.PNG").write_bytes(PNG)
    (tmp_path / "A.TXT").write_text("in capitals")
    reader = Folder(path=str(tmp_path)).open()
    assert reader.read(("A.PNG",)) == Content(captions=("in capitals",), picture=PNG)
    assert reader.measure(("A.PNG",)) == Size(40, 60)
    (tmp_path / "A.txt").write_text("as usual")
    assert reader.read(("A.PNG",)).captions == ("as usual",)


def test_captions_that_cannot_be_read_are_said_of_their_picture(tmp_path: Path) -> None:
    for name in ("folder", "loop"):
        (tmp_path / f"{name}.png").write_bytes(PNG)
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    reader = Folder(path=str(tmp_path)).open()
    for name, why in (("folder", "Is a directory"), ("loop", "Too many levels of symbolic links")):
        assert reason(reader, (f"{name}.png",), measured=False) == (
            f"its captions cannot be read ({why})"
        )
        with pytest.raises(Unusable, match=rf"there is no {name}\.txt beside it"):
            reader.measure((f"{name}.png",))


def test_a_name_that_is_no_text_can_be_printed() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert Item(number=0, where=(name,)).name.encode() == b"caf\\udce9.png"


@pytest.mark.parametrize(("kind", "suffix"), [(WebDataset, "tar"), (Captions, "txt")])
def test_a_file_of_many_that_cannot_be_read_is_named(
    tmp_path: Path, kind: type[Source], suffix: str
) -> None:
    path = tmp_path / f"1.{suffix}"
    write_tar(path, {"a.png": PNG, "a.txt": b"a"})
    reader = kind(path=str(tmp_path)).open()
    (where, *_) = reader.find()
    path.unlink()
    with pytest.raises(UserError, match=rf"source\.path: .*/1\.{suffix} cannot be read \(No such"):
        reader.read(where)
    path.symlink_to(path)
    with pytest.raises(UserError, match=rf"/1\.{suffix} .*Too many levels of symbolic links"):
        list(reader.find())


# Tars


def test_tars_are_read_in_the_order_of_their_members(tmp_path: Path) -> None:
    said = json.dumps({"caption": " from json ", "text": "not this", "width": 60}).encode()
    several = json.dumps({"captions": ["one", "", "two"]}).encode()
    write_tar(
        tmp_path / "b" / "1.tar",
        {
            "0001.jpg": encoded(picture(1, 64, 48), "JPEG"), "0001.json": said,
            "0001.txt": b"from text\nand another", "0001.cls": b"7",
            "deep/0002.webp": encoded(picture(2), "WEBP"), "deep/0002.json": said,
        },
    )  # fmt: skip
    write_tar(tmp_path / "a.tar", {"x.PNG": PNG, "x.json": several})
    reader = WebDataset(path=str(tmp_path)).open()
    first, second, third = reader.find()
    assert names(reader) == ["a.tar:x", "b/1.tar:0001", "b/1.tar:deep/0002"]
    assert reader.read(first) == Content(captions=("one", "two"), picture=PNG)
    assert reader.read(second).captions == ("from text", "and another")
    assert reader.read(third).captions == ("from json",)
    assert [reader.measure(where) for where in (first, second, third)] == [
        Size(40, 60), Size(64, 48), Size(64, 64)
    ]  # fmt: skip


def test_a_header_longer_than_expected_is_read_too(tmp_path: Path) -> None:
    data = encoded(picture(3, 50, 70), "JPEG", icc_profile=bytes(2 * HEADER))
    assert data.index(b"\xff\xc0") > HEADER  # where JPEG keeps the size
    write_tar(tmp_path / "1.tar", {"a.jpg": data, "a.txt": b"a"})
    reader = WebDataset(path=str(tmp_path / "1.tar")).open()
    assert [reader.measure(where) for where in reader.find()] == [Size(50, 70)]


def test_what_a_sample_in_a_tar_lacks_is_said(tmp_path: Path) -> None:
    members = {
        "a.png": PNG, "b.txt": b"b", "c.png": PNG, "c.json": b'{"title": "c"}', "d.png": PNG,
        "d.json": b"{", "e.png": PNG, "e.json": b"[1]", "f.png": PNG, "f.json": b'{"caption": 5}',
        "g.png": PNG, "g.json": b"[" * 100_000,
    }  # fmt: skip
    write_tar(tmp_path / "1.tar", members)
    reader = WebDataset(path=str(tmp_path)).open()
    a, b, *rest = reader.find()
    assert reason(reader, a) == "the tar holds no txt or json for it"
    assert reason(reader, b) == "the tar holds no jpg or jpeg or png or webp or bmp for it"
    assert {reason(reader, where, measured=False) for where in rest} == {
        "it has no caption",
        "its .json holds no caption or captions or text",
    }


@pytest.mark.parametrize("name", ["a.pth", "a.latent.pt", "deep/a.PKL", "a.pickle", "a.pyd"])
def test_a_pickle_in_a_tar_is_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "1.tar", {"a.png": PNG, "a.txt": b"a", name: b"anything"})
    with pytest.raises(UserError, match=f"member {name} is a pickle, and nothing here unpickles"):
        list(WebDataset(path=str(tmp_path)).open().find())


def test_a_tar_that_is_none_or_not_whole_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", {"a.png": encoded(picture(1)), "a.txt": b"a"})
    whole = path.read_bytes()
    for damaged in (b"\x1f\x8b" + whole, whole[:700], b"x" * 600):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"1\.tar is not a whole, uncompressed tar"):
            list(WebDataset(path=str(tmp_path)).open().find())


# Parquet


def test_rows_of_parquet_are_read_in_order(tmp_path: Path) -> None:
    pictures = [encoded(picture(n, 40 + n, 60), "JPEG") for n in range(8)]
    texts = [f" prompt {n} " for n in range(8)]
    write_parquet(tmp_path / "b.parquet", {"text": texts, "image_bytes": pictures, "id": texts})
    write_parquet(tmp_path / "a.parquet", {"text": [["x", "y"]], "image_bytes": [PNG]})
    reader = Parquet(path=str(tmp_path)).open()
    found = list(reader.find())
    assert names(reader) == ["a.parquet:0", *(f"b.parquet:{n}" for n in range(8))]
    assert reader.read(found[0]) == Content(captions=("x", "y"), picture=PNG)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(reader.read, found[:0:-1]))
        sizes = list(pool.map(reader.measure, found[1:]))
    assert read == [
        Content(captions=(f"prompt {n}",), picture=pictures[n]) for n in reversed(range(8))
    ]
    assert sizes == [Size(40 + n, 60) for n in range(8)]


def test_columns_have_the_names_that_were_chosen(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"prompt": ["a"], "jpg": [PNG], "more": [1]})
    reader = Parquet(path=str(path), text="prompt", image="jpg").open()
    assert [reader.read(where).captions for where in reader.find()] == [("a",)]
    with pytest.raises(UserError, match=r"source\.text: .* has no column text; it has: prompt, jp"):
        list(Parquet(path=str(path), image="jpg").open().find())
    with pytest.raises(UserError, match=r"source\.image: .* has no column image_bytes"):
        list(Parquet(path=str(path), text="prompt").open().find())


def test_what_a_row_lacks_is_said(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"text": ["a", None, " "], "image_bytes": [None, PNG, PNG]}
    reader = Parquet(path=str(write_parquet(tmp_path / "1.parquet", columns))).open()
    no_picture, no_text, blank = reader.find()
    assert reason(reader, no_picture) == "its image is None, not the bytes of a file"
    assert "neither a string nor a list" in reason(reader, no_text, measured=False)
    assert reason(reader, blank, measured=False) == "it has no caption"


def test_pictures_may_stand_in_structures(tmp_path: Path) -> None:
    """As Hugging Face's datasets writes them."""
    images = [{"bytes": PNG, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    columns: dict[str, list[Any]] = {
        "text": ["a", "b"], "image_bytes": images, "reference_bytes": [images[:1], images]
    }  # fmt: skip
    path = str(write_parquet(tmp_path / "1.parquet", columns))
    reader = Parquet(path=path, references=1).open()
    first, second = reader.find()
    assert reader.measure(first) == Size(40, 60)
    assert reader.read(first) == Content(captions=("a",), picture=PNG, references=(PNG,))
    assert "not the bytes of files" in reason(reader, second, measured=False)
    assert "not the bytes of a file" in reason(Parquet(path=path).open(), second)


def test_a_caption_that_is_none_does_not_cost_the_others(tmp_path: Path) -> None:
    lists: list[Any] = [["a", None, "b"], [None]]
    columns = {"text": lists, "image_bytes": [PNG] * 2}
    reader = Parquet(path=str(write_parquet(tmp_path / "1.parquet", columns))).open()
    both, none = reader.find()
    assert reader.read(both).captions == ("a", "b")
    assert reason(reader, none, measured=False) == "it has no caption"
    said = json.dumps({"captions": ["a", None, "b"]}).encode()
    tar = write_tar(tmp_path / "1.tar", {"x.png": PNG, "x.json": said})
    (where,) = WebDataset(path=str(tar)).open().find()
    assert WebDataset(path=str(tar)).open().read(where).captions == ("a", "b")


@pytest.mark.parametrize(("together", "most"), [(parquet.TOGETHER, 2), (100, 1)])
def test_large_row_groups_are_in_memory_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, most: int
) -> None:
    monkeypatch.setattr(parquet, "TOGETHER", together)
    columns: dict[str, list[Any]] = {
        "text": [f"prompt {n}" for n in range(12)],
        "image_bytes": [PNG] * 12,
    }
    path = write_parquet(tmp_path / "1.parquet", columns)
    names = {"text": "text", "image": "image_bytes"}
    rows = parquet.Rows(tmp_path, names)
    held = []
    for n, where in enumerate(rows.find(path.name)):
        assert rows.row(where, "image") == {"image": PNG}
        assert rows.row(where)["text"] == f"prompt {n}"
        held.append(len(rows._groups))
    assert max(held) == most


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "1.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"1\.parquet is not a whole Parquet file"):
        list(Parquet(path=str(path)).open().find())
    write_parquet(path, {"text": ["a" * 999], "image_bytes": [PNG]})
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    reader = Parquet(path=str(path)).open()
    with pytest.raises(UserError, match=r"1\.parquet is not a whole Parquet file"):
        [reader.read(where) for where in reader.find()]


def test_without_pyarrow_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'twinflow-train\[parquet\]'"):
        Parquet(path=str(tmp_path)).open()


# Captions


def test_captions_are_the_lines_of_text_files(tmp_path: Path) -> None:
    text = "\ufefffirst\n\n  \nzw\u00f6lf Boxk\u00e4mpfer \r\nlast"
    (tmp_path / "b.txt").write_bytes(text.encode())
    (tmp_path / "a.txt").write_text("one\n")
    reader = Captions(path=str(tmp_path)).open()
    assert names(reader) == ["a.txt:1", "b.txt:1", "b.txt:4", "b.txt:5"]
    read = [reader.read(where) for where in reader.find()]
    assert read == [
        Content(captions=(caption,))
        for caption in ("one", "first", "zw\u00f6lf Boxk\u00e4mpfer", "last")
    ]


def test_captions_are_a_column_of_parquet_files_too(tmp_path: Path) -> None:
    (tmp_path / "2.txt").write_text("e")
    columns: dict[str, list[Any]] = {"prompt": ["a", "b", "c", "d"], "image_bytes": [b""] * 4}
    write_parquet(tmp_path / "1.parquet", columns)
    reader = Captions(path=str(tmp_path), text="prompt").open()
    assert [reader.read(where).captions for where in reader.find()] == [(c,) for c in "abcde"]


# All


@pytest.mark.parametrize("kind", [Folder, WebDataset, Parquet, Captions])
def test_a_place_without_anything_is_named(tmp_path: Path, kind: type[Source]) -> None:
    if kind is Parquet:
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"source\.path: .*nowhere does not exist"):
        kind(path=str(tmp_path / "nowhere")).open()
    (tmp_path / "readme.md").touch()
    with pytest.raises(UserError, match=r"source\.path: .* holds no \..* file"):
        list(kind(path=str(tmp_path)).open().find())


def test_what_file_managers_leave_in_a_tar_is_passed_over(tmp_path: Path) -> None:
    members = {"a/.DS_Store": b"x", "._0.jpg": b"x", "a/0.png": PNG, "a/0.txt": b"one"}
    write_tar(tmp_path / "0.tar", members)
    reader = WebDataset(path=str(tmp_path)).open()
    assert names(reader) == ["0.tar:a/0"]
