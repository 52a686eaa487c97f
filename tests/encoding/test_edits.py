"""Reference images: found beside each kind of picture, counted, cut, and encoded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoding.jobs import CPU, run, settings, skipped
from tests.encoding.tools import encoded, picture, pixels, write_parquet, write_tar
from tests.pipelines.qwen_image_edit import write_edit_pipeline
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.folder import Folder
from twinflow_train.encoding.generated import Generated
from twinflow_train.encoding.images import NoImages
from twinflow_train.encoding.parquet import Parquet
from twinflow_train.encoding.pictures import Unusable, scaled
from twinflow_train.encoding.sources import Content, Source
from twinflow_train.encoding.tars import WebDataset
from twinflow_train.errors import UserError
from twinflow_train.models.qwen_edit_codec import QwenImageEditCodec, QwenImageEditEncoders

KINDS = ["folder", "webdataset", "parquet"]
SUFFIXES = ("png", "jpg", "webp")
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def shown(number: int, references: int) -> list[bytes]:
    """Make the files of an item: its picture, and its reference images of several formats."""
    files = [encoded(picture(10 * number, 64, 64))]
    for n in range(references):
        image = picture(10 * number + n + 1, 64, 64 + 16 * (n % 2))
        files.append(encoded(image, FORMATS[SUFFIXES[n % 3]]))
    return files


def write(kind: str, root: Path, items: dict[str, int]) -> Source:
    """Write items with so many reference images each as a source of a kind has them."""
    root.mkdir(parents=True)
    files = {
        f"{name}.{n}": data for name, n, data in (
            (name, f"ref{at - 1}.{SUFFIXES[(at - 1) % 3]}" if at else "png", data)
            for number, (name, many) in enumerate(items.items())
            for at, data in enumerate(shown(number, many))
        )
    } | {f"{name}.txt": f"do {name}".encode() for name in items}  # fmt: skip
    if kind == "folder":
        for name, data in files.items():
            (root / name).write_bytes(data)
        return Folder(path=str(root), references=2)
    if kind == "webdataset":
        write_tar(root / "a.tar", files)
        return WebDataset(path=str(root), references=2)
    every = [shown(number, many) for number, many in enumerate(items.values())]
    columns: dict[str, list[Any]] = {
        "text": [f"do {name}" for name in items],
        "image_bytes": [one[0] for one in every],
        "before": [one[1:] for one in every],
    }
    write_parquet(root / "a.parquet", columns)
    return Parquet(path=str(root), references=2, reference="before")


def contents(source: Source) -> dict[str, Content | str]:
    """Read all that a source has, or why it cannot be used, by the item's caption or name."""
    reader, found = source.open(), dict[str, Content | str]()
    for where in reader.find():
        try:
            reader.measure(where)
            content = reader.read(where)
            found[content.captions[0]] = content
        except Unusable as reason:
            found[":".join(map(str, where[:2]))] = str(reason)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_item_has_its_own_reference_images_in_order(tmp_path: Path, kind: str) -> None:
    found = contents(write(kind, tmp_path / "source", {"a": 2, "b": 2}))
    assert found == {
        f"do {name}": Content(
            captions=(f"do {name}",),
            picture=shown(number, 2)[0],
            references=tuple(shown(number, 2)[1:]),
        )
        for number, name in enumerate("ab")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_items_with_fewer_or_more_are_left_out_with_both_numbers(tmp_path: Path, kind: str) -> None:
    found = contents(write(kind, tmp_path / "source", {"a": 2, "b": 0, "c": 1, "d": 3}))
    assert isinstance(found.pop("do a"), Content)
    assert list(found.values()) == [
        f"it has {many} reference images, source.references is 2" for many in (0, 1, 3)
    ]


def test_one_reference_image_may_stand_in_a_parquet_row_without_a_list(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "text": ["x"],
        "image_bytes": [b"1"],
        "reference_bytes": [b"2"],
    }
    write_parquet(tmp_path / "a.parquet", columns)
    reader = Parquet(path=str(tmp_path), references=1).open()
    assert [reader.read(where).references for where in reader.find()] == [(b"2",)]
    with pytest.raises(UserError, match=r"source\.reference: .* has no column before"):
        next(Parquet(path=str(tmp_path), references=1, reference="before").open().find())
    write_parquet(tmp_path / "a.parquet", columns | {"reference_bytes": [3]})
    reader = Parquet(path=str(tmp_path), references=1).open()
    with pytest.raises(Unusable, match="its references are 3, not the bytes of files"):
        reader.read(next(reader.find()))


@cache
def _pipeline(folder: Path) -> Path:
    return write_edit_pipeline(folder)


def edit_pipeline(factory: pytest.TempPathFactory) -> Path:
    """Return the tiny pipeline's folder, built once a session."""
    return _pipeline(factory.getbasetemp() / "tiny-edit-pipeline")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edit_pipeline(tmp_path_factory)


@pytest.fixture(scope="module")
def codec(tiny: Path) -> QwenImageEditCodec:
    encoders = QwenImageEditEncoders(path=str(tiny))
    return encoders.open(encoders.find(), CPU)


def test_a_set_holds_what_the_codec_makes_of_each_item(
    tiny: Path, codec: QwenImageEditCodec, tmp_path: Path
) -> None:
    source = write("folder", tmp_path / "source", {"a": 2, "b": 2, "c": 1})
    (tmp_path / "source" / "a.txt").write_text("do a\nor so\n")
    long = encoded(picture(1, 40, 400))
    for name, data in (("png", shown(7, 0)[0]), ("ref0.png", long), ("ref1.png", long)):
        (tmp_path / "source" / f"d.{name}").write_bytes(data)
    (tmp_path / "source" / "d.txt").write_text("do d")
    outcome = run(
        settings(
            tmp_path / "set", tiny, source=source, encoders=QwenImageEditEncoders(path=str(tiny))
        )
    )
    assert outcome.manifest is not None
    form, about = outcome.manifest.form, outcome.manifest.about
    assert (form.references, form.own_null, about.null_prompt) == (2, True, "Edit this image.")
    assert skipped(tmp_path / "set") == {
        "c.png": "it has 1 reference images, source.references is 2",
        "d.png": "a reference image: 40x400 is too small: it would be enlarged 1.60 times to "
        "64x64, images.upscale allows 1.25",
    }
    shards = ShardSet(tmp_path / "set")
    shards.verify()
    assert len(shards) == 2
    for number, captions in enumerate((("do a", "or so"), ("do b",))):
        cut = [pixels(picture(10 * number + 1)), pixels(picture(10 * number + 2, 64, 80))]
        cut[1] = cut[1][:, :, 8:72]
        stored = shards.read(number)
        # The second one was written as JPEG, and cut by Pillow.
        torch.testing.assert_close(
            stored.references[0], codec.encode(scaled(cut[0][None]))[0], rtol=1e-4, atol=1e-4
        )
        other = codec.encode(scaled(cut[1][None]))[0]
        assert float((stored.references[1] - other).abs().mean()) < 0.1 * float(other.std())
        for n, caption in enumerate(captions):
            assert shards.read(number, caption=n).caption == caption
        assert stored.null is not None
        texts = codec.embed_edits([captions[0], "Edit this image."], cut)
        for ours, theirs in zip((stored.text, stored.null), texts, strict=True):
            assert ours.shape == theirs.tokens.shape
            mean = float((ours.float() - theirs.tokens).abs().mean())
            assert mean < 0.1 * float(theirs.tokens.std())


def test_references_and_encoders_must_go_together(tiny: Path, tmp_path: Path) -> None:
    edits = QwenImageEditEncoders(path=str(tiny))
    with pytest.raises(UserError, match=r"references is 2, and these encoders look at 0"):
        settings(tmp_path / "set", tiny, source=Folder(path="x", references=2))
    with pytest.raises(UserError, match=r"references is 0, and these encoders look at 1 or more"):
        settings(tmp_path / "set", tiny, source=Folder(path="x"), encoders=edits)
    for images in (NoImages(), Generated()):
        with pytest.raises(UserError, match=r"references is 1, and only images=stored has"):
            settings(
                tmp_path / "set",
                tiny,
                source=Captions(path="x", references=1),
                encoders=edits,
                images=images,
            )
    with pytest.raises(UserError, match=r"source\.references is -1; it must be 0 or more"):
        Folder(path="x", references=-1)


def test_a_set_without_references_is_what_it_was(tiny: Path, tmp_path: Path) -> None:
    source = Parquet(path="x")
    made = settings(tmp_path / "set", tiny, source=source).identity("1", device=CPU)
    assert not [key for key in made if key.startswith("source.ref")]
    edits = settings(
        tmp_path / "set",
        tiny,
        source=replace(source, references=1),
        encoders=QwenImageEditEncoders(path=str(tiny)),
    ).identity("1", device=CPU)
    assert (edits["source.references"], edits["source.reference"]) == (1, "reference_bytes")
