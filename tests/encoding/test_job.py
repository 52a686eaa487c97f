"""From each kind of source to a set, with the real encoders, by any number of workers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoding.jobs import codec, pipeline, run, settings, skipped
from tests.encoding.tools import (
    SIZES,
    encoded,
    picture,
    pixels,
    write_folder,
    write_parquet,
    write_tar,
)
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.folder import Folder
from twinflow_train.encoding.images import NoImages, Stored
from twinflow_train.encoding.parquet import Parquet
from twinflow_train.encoding.pictures import Size, load, scaled
from twinflow_train.encoding.settings import KEEPING, settle
from twinflow_train.encoding.tars import WebDataset
from twinflow_train.engines.base import Precision
from twinflow_train.errors import UserError
from twinflow_train.models.qwen_codec import QwenImageEncoders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "pictures", range(11))


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a set but the workers' own."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_becomes_a_set_whose_samples_are_its_pictures(
    tmp_path: Path, tiny: Path, pictures: Path
) -> None:
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(pictures)), licence="mine")
    outcome = run(prepared)
    shards = ShardSet(tmp_path / "set")
    shards.verify()
    assert outcome.manifest == shards.manifest
    assert (len(shards), outcome.samples, outcome.left, outcome.shards) == (11, 11, 0, 4)
    about, form = shards.manifest.about, shards.manifest.form
    assert (about.encoder, about.null_prompt) == (tiny.name, "Generate an image.")
    assert (about.licence, about.revision[:7]) == ("mine", "sha256:")
    assert (form.latent_dtype, form.text_dtype, form.text_width) == ("float32", "bfloat16", 16)
    stock, found = codec(tiny), {}
    for index in range(len(shards)):
        sample = shards.read(index)
        number = int(sample.fields["source"][-7:-4])
        found[number] = sample
        original, image = load(
            (pictures / sample.fields["source"]).read_bytes(), Size(*sample.fields["size"])
        )
        assert sample.fields["original_size"] == list(original) == list(SIZES[number % 4])
        expected = stock.encode(scaled(image)[None])[0]
        torch.testing.assert_close(sample.image, expected, rtol=1e-4, atol=1e-4)
        captions = [f"picture {number}", f"the image of {number}"][: 1 + (number % 3 == 0)]
        for caption, text in zip(captions, stock.embed(captions, at_once=1), strict=True):
            read = shards.read(index, caption=captions.index(caption))
            assert read.caption == caption
            torch.testing.assert_close(read.text.float(), text.tokens, rtol=0.01, atol=0.01)
    assert found.keys() == set(range(11))
    null = stock.embed([stock.null_prompt], at_once=1)[0].tokens.bfloat16()
    assert torch.equal(shards.null.tokens[0], null)


def test_every_kind_of_source_gives_the_same_samples(tmp_path: Path, tiny: Path) -> None:
    files = [encoded(picture(n, *SIZES[n % 4])) for n in range(5)]
    texts = [f"picture {n}" for n in range(5)]
    (tmp_path / "folder").mkdir()
    for n, (file, text) in enumerate(zip(files, texts, strict=True)):
        (tmp_path / "folder" / f"{n}.png").write_bytes(file)
        (tmp_path / "folder" / f"{n}.txt").write_text(text + "\n")
    members = {f"{n}.png": file for n, file in enumerate(files)}
    write_tar(tmp_path / "1.tar", members | {f"{n}.txt": t.encode() for n, t in enumerate(texts)})
    write_parquet(tmp_path / "1.parquet", {"text": texts, "image_bytes": files})
    sources = (
        Folder(path=str(tmp_path / "folder")),
        WebDataset(path=str(tmp_path / "1.tar")),
        Parquet(path=str(tmp_path / "1.parquet")),
    )
    sets = []
    for n, source in enumerate(sources):
        run(settings(tmp_path / f"set{n}", tiny, source=source))
        sets.append(ShardSet(tmp_path / f"set{n}"))
    for index in range(5):
        first, *others = (shards.read(index) for shards in sets)
        for other in others:
            assert (other.key, other.caption) == (first.key, first.caption)
            assert torch.equal(other.image, first.image)
            assert torch.equal(other.text, first.text)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_workers_makes_the_same_bytes(
    tmp_path: Path, tiny: Path, pictures: Path, count: int
) -> None:
    alone = settings(tmp_path / "alone", tiny, source=Folder(path=str(pictures)))
    run(alone)
    shared = replace(alone, folder=str(tmp_path / "shared"))
    outcomes = [run(shared, number, count) for number in range(count)]
    assert sum(outcome.samples for outcome in outcomes) == 11
    assert [outcome.manifest is None for outcome in outcomes] == [o.left > 0 for o in outcomes]
    assert (outcomes[0].left, outcomes[-1].left) == (4 - -(-4 // count), 0)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_what_is_finished_is_kept_and_what_is_not_is_made_by_others(
    tmp_path: Path, tiny: Path, pictures: Path
) -> None:
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(pictures)))
    assert run(prepared, 1, 3).left == 3
    folder = tmp_path / "set"
    (folder / "000002.tar.123.tmp").write_bytes(b"half a shard")
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    outcomes = [run(prepared, number, 2) for number in (0, 1)]
    assert [outcome.shards for outcome in outcomes] == [2, 1]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(folder.glob("*.tmp"))
    again = run(prepared)
    assert (again.shards, again.manifest) == (0, outcomes[1].manifest)
    ShardSet(folder).verify()


def test_a_shard_without_a_record_is_made_again(tmp_path: Path, tiny: Path, pictures: Path) -> None:
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(pictures)))
    run(prepared)
    before = contents(tmp_path / "set")
    (tmp_path / "set" / KEEPING / "000001.json").unlink()
    (tmp_path / "set" / "000001.tar").write_bytes(b"half")
    assert run(prepared).shards == 1
    assert contents(tmp_path / "set") == before


def test_what_is_left_out_is_listed_with_its_reason(tmp_path: Path, tiny: Path) -> None:
    source = write_folder(tmp_path / "source", range(4))
    (source / "even" / "002.txt").unlink()
    cut = source / "odd" / "003.png"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (source / "odd" / "001.txt").write_text("\n")
    picture(9, 16, 16).save(source / "small.png")
    (source / "small.txt").write_text("small")
    outcome = run(settings(tmp_path / "set", tiny, source=Folder(path=str(source))))
    assert outcome.samples == len(ShardSet(tmp_path / "set")) == 1
    found = skipped(tmp_path / "set")
    assert [each.name for each in outcome.skipped] == list(found)
    assert found.pop("small.png").startswith("16x16 is too small")
    assert found == {
        "even/002.png": "there is no 002.txt beside it",
        "odd/001.png": "it has no caption",
        "odd/003.png": "not a picture that can be read (OSError)",
    }


def test_when_nothing_is_left_there_is_no_set(tmp_path: Path, tiny: Path) -> None:
    source = write_folder(tmp_path / "source", range(2))
    for path in source.rglob("*.txt"):
        path.write_text("")
    with pytest.raises(
        UserError, match=r"none of 2 items can be used, even/000\.png because it has"
    ):
        run(settings(tmp_path / "set", tiny, source=Folder(path=str(source))))
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert len(skipped(tmp_path / "set")) == 2


def test_what_is_not_finite_is_left_out(tmp_path: Path, tiny: Path) -> None:
    """A text encoder whose embedding of one word overflows."""
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    path = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if "embed_tokens" in name)
    word = codec(tiny)._pipeline.tokenizer("relationships").input_ids[-1]
    tensors[name][word] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    source = write_folder(tmp_path / "source", range(2))
    (source / "odd" / "001.txt").write_text("relationships")
    run(settings(tmp_path / "set", broken, source=Folder(path=str(source))))
    assert skipped(tmp_path / "set") == {"odd/001.png": "its encoding is not finite"}


def test_prompts_alone_become_a_set_without_latents(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(7)))
    run(
        settings(
            tmp_path / "set", tiny, source=Captions(path=str(tmp_path / "prompts.txt")),
            images=NoImages(sizes=[[64, 64], [32, 96]]),
        )
    )  # fmt: skip
    shards = ShardSet(tmp_path / "set")
    shards.verify()
    assert shards.manifest.form.latent_dtype == "none"
    assert set(shards.manifest.buckets) == {(16, 8, 8), (16, 4, 12)}
    samples = [shards.read(index) for index in range(len(shards))]
    assert {sample.caption for sample in samples} == {f"prompt {n}" for n in range(7)}
    assert all(sample.latent is None for sample in samples)


@pytest.mark.parametrize("latents", Precision)
def test_types_are_those_that_were_chosen(tmp_path: Path, tiny: Path, latents: Precision) -> None:
    source = Folder(path=str(write_folder(tmp_path / "source", range(2))))
    texts = Precision.fp32 if latents is Precision.bf16 else Precision.bf16
    run(settings(tmp_path / "set", tiny, source=source, latents=latents, texts=texts))
    sample = ShardSet(tmp_path / "set").read(0)
    assert (sample.image.dtype, sample.text.dtype) == (latents.dtype, texts.dtype)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"samples_per_shard": 4}, "samples_per_shard was 3, now 4"),
        ({"latents": Precision.bf16}, "latents was fp32, now bf16"),
        ({"licence": "other"}, "licence was not stated, now other"),
        ({"images": Stored(side=128)}, "images.side was 64, now 128"),
        ({"source": WebDataset(path="x")}, "source was Folder, now WebDataset"),
    ],
)
def test_a_set_is_not_continued_with_other_settings(
    tmp_path: Path, tiny: Path, pictures: Path, change: dict[str, Any], key: str
) -> None:
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(pictures)))
    run(prepared, 0, 3)
    with pytest.raises(UserError, match="was begun with other settings: ") as error:
        run(replace(prepared, **change))
    assert key in str(error.value)
    run(replace(prepared, batch=5, loaders=1, verify=True), 1, 3)


def test_a_set_is_not_continued_with_other_weights_but_from_anywhere(
    tmp_path: Path, tiny: Path, pictures: Path
) -> None:
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(pictures)))
    run(prepared, 0, 2)
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    run(replace(prepared, encoders=QwenImageEncoders(path=str(moved))), 1, 2)
    config = moved / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_std": [2.0] * 16}))
    with pytest.raises(UserError, match=r"encoders\.revision was sha256:"):
        run(replace(prepared, encoders=QwenImageEncoders(path=str(moved))))


def test_a_set_is_not_continued_on_another_kind_of_device(tmp_path: Path, tiny: Path) -> None:
    prepared = settings(tmp_path / "set", tiny, source=Folder(path="pictures"))
    here, there = (prepared.identity("r", device=torch.device(kind)) for kind in ("cpu", "cuda"))
    settle(tmp_path, here)
    with pytest.raises(UserError, match=r"encoders\.device was cpu, now cuda"):
        settle(tmp_path, there)


def test_what_does_not_go_together_is_refused_before_anything_is_made(
    tmp_path: Path, tiny: Path
) -> None:
    captions, pictures = Captions(path="prompts.txt"), Folder(path="pictures")
    folder = tmp_path / "set"
    with pytest.raises(UserError, match="captions and no pictures: choose images=none"):
        settings(folder, tiny, source=captions)
    with pytest.raises(UserError, match="has pictures: choose images=stored, or source=captions"):
        settings(folder, tiny, source=pictures, images=NoImages())
    with pytest.raises(UserError, match="verify=true decodes latents, and images=none has none"):
        settings(folder, tiny, source=captions, images=NoImages(), verify=True)
    for key in ("samples_per_shard", "batch", "loaders"):
        with pytest.raises(UserError, match=f"{key} is 0; it must be at least 1"):
            settings(folder, tiny, source=pictures, **{key: 0})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"folder: .*file.* cannot be made \(Not a directory\)"):
        run(settings(tmp_path / "file", tiny, source=pictures))


def test_pixels_of_the_helper_are_those_of_the_picture() -> None:
    image = picture(1)
    assert pixels(image)[:, 3, 5].tolist() == list(image.getpixel((5, 3)))  # type: ignore[arg-type]
