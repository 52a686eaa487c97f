from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset

from tests.data.tools import ABOUT, make_sample, make_set
from twinflow_train.data.loader import Shards
from twinflow_train.data.sample import Sample
from twinflow_train.data.shards import DataError, ShardSet
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError


def write(folder: Path, samples: list[Sample], *, overwrite: bool = False) -> ShardSet:
    return write_shards(folder, samples, null=torch.ones(3, 6), about=ABOUT, overwrite=overwrite)


def test_every_sample_reads_back_exactly(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", 10, samples_per_shard=4)
    assert (len(shards), shards.counts) == (10, (4, 4, 2))
    for index in (9, 0, 4, 3, 8, 1, 2, 5, 6, 7):
        wrote = make_sample(index)
        for caption in (0, 1, 2):
            read = shards.read(index, caption=caption)
            chosen = caption % 2
            assert (read.key, read.caption) == (wrote.key, wrote.captions[chosen])
            assert read.fields == wrote.fields
            assert torch.equal(read.image, wrote.image)
            assert torch.equal(read.text, wrote.texts[chosen])
            assert read.text.dtype == torch.bfloat16


def test_the_null_prompt_is_a_condition_of_one_row(tmp_path: Path) -> None:
    null = make_set(tmp_path / "set").null
    assert null.tokens.shape == (1, 3, 6)
    assert null.tokens.dtype == torch.float32
    assert null.mask is None


def test_the_stock_webdataset_reader_opens_the_shards(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", 10, samples_per_shard=4)
    files = [str(shards.folder / shard.file) for shard in shards.manifest.shards]
    read = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [make_sample(i).key for i in range(10)]
    for index, sample in enumerate(read):
        wrote = make_sample(index)
        tensors = safetensors.torch.load(sample["safetensors"])
        assert tensors.keys() == {"latent", "text.0", "text.1"}
        assert torch.equal(tensors["text.1"], wrote.texts[1])
        assert json.loads(sample["json"]) == {"captions": list(wrote.captions), **wrote.fields}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    assert make_set(tmp_path / "one").manifest == make_set(tmp_path / "two").manifest


def test_threads_read_what_one_thread_reads_with_one_shard_open(tmp_path: Path) -> None:
    shards = ShardSet(make_set(tmp_path / "set", 20, samples_per_shard=3).folder, keep_open=1)
    order = [(7 * i) % 20 for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: float(shards.read(i).image.mean()), order))
    assert read == [float(i) for i in order]


def test_a_sample_outside_the_set_is_an_index_error(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", 10)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            shards.read(index)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield make_sample(0)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shards(tmp_path / "set", broken(), null=torch.ones(3, 6), about=ABOUT)
    assert os.listdir(tmp_path) == []


def test_an_existing_set_is_replaced_only_on_request(tmp_path: Path) -> None:
    write(tmp_path / "set", [make_sample(0)])
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "set", [make_sample(1)])
    replaced = write(tmp_path / "set", [make_sample(1), make_sample(2)], overwrite=True)
    assert [replaced.read(i).key for i in range(2)] == ["s001", "s002"]
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.full((1, 4, 4), math.nan)}, "s001.*not finite"),
        ({"latent": torch.zeros(1, 4, 5)}, r"s001.*\(1, 4, 5\)"),
        ({"latent": torch.zeros(1, 4, 4).double()}, "s001.*float64"),
        ({"texts": (torch.full((2, 6), math.inf).bfloat16(),) * 2}, "s001.*text.*not finite"),
        ({"texts": (torch.zeros(0, 6).bfloat16(),) * 2}, r"s001.*\(0, 6\)"),
        ({"key": "../s001"}, "key"),
        ({"key": "/s001"}, "key"),
        ({"key": "s.001"}, "key"),
        ({"key": "s" * 81}, "key"),
        ({"key": "s000"}, "same key"),
        ({"fields": {"captions": 1}}, "captions"),
    ],
)
def test_a_bad_sample_is_never_written(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    bad = replace(make_sample(1), **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", [make_sample(0), bad])
    assert os.listdir(tmp_path) == []


def test_captions_and_embeddings_must_be_equally_many() -> None:
    with pytest.raises(UserError, match=r"s000.*1 captions, 2 embeddings"):
        replace(make_sample(0), captions=("one",))


def test_no_samples_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples"):
        write(tmp_path / "set", [])


def test_a_missing_folder_or_manifest_names_the_config_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path.*nowhere does not exist; build shards"):
        ShardSet(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.heldout.*has no manifest\.json; build shards"):
        ShardSet(tmp_path, option="data.heldout")


def rewrite_manifest(shards: ShardSet, text: str) -> None:
    (shards.folder / "manifest.json").write_text(text)


def test_samples_without_latents_are_a_set_when_its_shape_is_said(tmp_path: Path) -> None:
    samples = [replace(make_sample(n), latent=None) for n in range(5)]
    options: dict[str, Any] = {"null": torch.ones(3, 6), "about": ABOUT, "samples_per_shard": 2}
    with pytest.raises(UserError, match="sample s000 has no latent: give write_shards the latent_"):
        write_shards(tmp_path / "set", samples, **options)
    shards = write_shards(tmp_path / "set", samples, **options, latent_shape=(1, 4, 4))
    shards.verify()
    assert shards.latent_shape == (1, 4, 4)
    assert shards.manifest.form.latent_dtype == "none"
    read = [shards.read(n, caption=1) for n in range(5)]
    assert [(one.key, one.latent) for one in read] == [(one.key, None) for one in samples]
    assert all(torch.equal(a.text, b.texts[1]) for a, b in zip(read, samples, strict=True))


def test_another_version_is_refused(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    rewrite_manifest(shards, '{"version": 1, "surprise": []}')
    with pytest.raises(UserError, match="version 1, but this program reads version 2"):
        ShardSet(shards.folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 2, "shards": []}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    shards = make_set(tmp_path / "set")
    rewrite_manifest(shards, text)
    with pytest.raises(UserError, match="not a manifest"):
        ShardSet(shards.folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    said = (shards.folder / "manifest.json").read_text()
    rewrite_manifest(shards, said.replace("000001.tar", "../000001.tar"))
    with pytest.raises(UserError, match="not a manifest"):
        ShardSet(shards.folder)


def test_a_tar_of_another_size_is_noticed_when_the_set_is_opened(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    path = shards.folder / "000001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2000])
    said = (
        rf"000001\.tar: it has {size - 2000} bytes, the manifest says {size}; copy the file again"
    )
    with pytest.raises(UserError, match=said):
        ShardSet(shards.folder)


@pytest.mark.parametrize("file", ["000001.tar", "000001.index.json", "null.safetensors"])
def test_a_missing_file_is_noticed_when_the_set_is_opened(tmp_path: Path, file: str) -> None:
    shards = make_set(tmp_path / "set")
    (shards.folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        ShardSet(shards.folder)


def test_a_vanished_shard_is_named(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    (shards.folder / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar: sample s005 .*: No such file.*copy"):
        shards.read(5)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    path = shards.folder / "000001.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"000001\.tar: sample s005 .*: it has \d+ bytes, the"):
        shards.read(5)
    assert shards.read(0).key == "s000"


def put(shards: ShardSet, members: dict[str, bytes], tokens: Sequence[int] = (2, 6)) -> ShardSet:
    """Replace the first shard by a tar of these members, with an index and a manifest that agree.

    The index has a sample for each key that has both of its members.
    """
    path = shards.folder / "000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        at = {member.name: (member.offset_data, member.size) for member in tar}
    keys = [name.removesuffix(".json") for name in at if name.endswith(".json")]
    both = [(key, at.get(f"{key}.safetensors"), at[f"{key}.json"]) for key in keys]
    index = json.dumps([[key, *one, *two, tokens] for key, one, two in both if one])
    return put_index(shards, index, samples=len(both))


def put_index(shards: ShardSet, index: str, *, samples: int) -> ShardSet:
    """Give the first shard another index, with a manifest that agrees with it and with the tar."""
    path = shards.folder / "000000.tar"
    path.with_name("000000.index.json").write_text(index)
    said = json.loads((shards.folder / "manifest.json").read_text())
    said["shards"][0] |= {
        "bytes": path.stat().st_size,
        "samples": samples,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "index_sha256": hashlib.sha256(index.encode()).hexdigest(),
    }
    rewrite_manifest(shards, json.dumps(said))
    return ShardSet(shards.folder)


def show_all(shards: ShardSet) -> None:
    """Read the samples of a set in batches of one, often enough for each of their captions."""
    data = Shards(path=str(shards.folder), prefetch=0)
    stream = data.stream(seed=0, batch=1)
    with closing(data.batches(stream, rows=[[0]], groups=[1], step=0)) as found:
        deque(islice(found, 8 * len(shards)), maxlen=0)


def packed(**change: torch.Tensor) -> bytes:
    sample = make_sample(0)
    tensors = {"latent": sample.image, "text.0": sample.texts[0], "text.1": sample.texts[1]}
    return safetensors.torch.save(tensors | change)


SAID = b'{"captions": ["one", "two"]}'


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": SAID, "a.safetensors": b"noise" * 100}, "not safetensors"),
        ({"a.json": SAID, "a.safetensors": (2**60).to_bytes(8, "little") * 50}, "not safetensors"),
        ({"a.json": SAID, "a.safetensors": packed()[:-80]}, "ends at byte"),
        ({"a.json": b"{", "a.safetensors": packed()}, "line 1 column 2"),
        ({"a.json": b"{}", "a.safetensors": packed()}, "captions"),
        ({"a.json": b'{"captions": []}', "a.safetensors": packed()}, "captions"),
        (
            {"a.json": SAID, "a.safetensors": packed(latent=torch.full((1, 4, 4), math.nan))},
            "`latent` is not finite",
        ),
        (
            {"a.json": SAID, "a.safetensors": packed(latent=torch.zeros(2, 4, 4))},
            r"`latent` is float32 \(2, 4, 4\), where float32 \(1, 4, 4\) is wanted",
        ),
        (
            {"a.json": SAID, "a.safetensors": packed(latent=torch.zeros(1, 4, 4).half())},
            "`latent` is float16 .* where float32 .* is wanted",
        ),
        (
            {"a.json": SAID, "a.safetensors": packed(**{"text.0": torch.zeros(2, 7).bfloat16()})},
            r"`text.0` is bfloat16 \(2, 7\), where bfloat16 \(tokens, 6\) is wanted",
        ),
    ],
)
def test_a_damaged_sample_is_named_with_its_shard(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    shards = put(make_set(tmp_path / "set", 1), members)
    match = rf"000000\.tar: sample a cannot be read: .*{message}"
    with pytest.raises(DataError, match=match):
        shards.read(0)
    if members["a.json"] == SAID:  # batches have no use for what it says
        with pytest.raises(DataError, match=match):
            show_all(shards)


def test_a_text_that_is_not_as_long_as_the_index_says_is_named(tmp_path: Path) -> None:
    members = {"a.json": SAID, "a.safetensors": packed()}
    shards = put(make_set(tmp_path / "set", 1), members, tokens=[3, 6])
    with pytest.raises(DataError, match=r"sample a .*: it has 2 tokens, the index says 3"):
        show_all(shards)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../a.json": SAID, "a.safetensors": packed()}, "not a plain file inside the tar"),
        ({"/a.json": SAID, "a.safetensors": packed()}, "not a plain file inside the tar"),
        ({"b/../a.json": SAID, "a.safetensors": packed()}, "not a plain file inside the tar"),
        ({"a.pth": b"", "a.json": SAID, "a.safetensors": packed()}, r"a\.pth.*only"),
        ({"a.pkl": b"", "a.json": SAID, "a.safetensors": packed()}, r"a\.pkl.*only"),
        ({"a.json": SAID, "a.safetensors": packed(), "b.json": SAID}, "not an index of"),
    ],
)
def test_verify_refuses_members_that_no_shard_has(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    shards = put(make_set(tmp_path / "set"), members)
    with pytest.raises(UserError, match=rf"000000\..*{message}"):
        shards.verify()


def test_verify_refuses_a_link(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    path = shards.folder / "000000.tar"
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = path.with_name("000000.index.json").read_text()
    with pytest.raises(UserError, match=r"000000\.tar: member 'a\.json' is not a plain file"):
        put_index(shards, index, samples=4).verify()


GOOD: list[object] = ["a", 512, 10, 1024, 10, [2]]


@pytest.mark.parametrize(
    "row",
    [
        ["../a", *GOOD[1:]],
        ["a", 10**9, *GOOD[2:]],
        ["a", 512, -10, *GOOD[3:]],
        ["a", "512", *GOOD[2:]],
        ["a", 512.5, *GOOD[2:]],
        [*GOOD[:3], -1024, *GOOD[4:]],
        [*GOOD[:5], []],
        [*GOOD[:5], [0]],
        [*GOOD[:5], 2],
        GOOD[:5],
        "aaaaaa",
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, row: object) -> None:
    shards = put_index(make_set(tmp_path / "set"), json.dumps([row]), samples=1)
    with pytest.raises(DataError, match=r"000000\.index\.json: not an index"):
        shards.read(0)
    with pytest.raises(UserError, match=r"000000\.index\.json: not an index"):
        shards.verify()


def test_an_index_that_was_changed_is_named(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    path = shards.folder / "000001.index.json"
    path.write_text(path.read_text().replace("s005", "s006"))
    with pytest.raises(DataError, match=r"000001\.index\.json: SHA-256"):
        shards.read(5)


def test_verify_finds_one_changed_byte(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    shards.verify()
    path = shards.folder / "000002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"000002\.tar: SHA-256"):
        shards.verify()


def test_verify_finds_an_index_of_another_tar(tmp_path: Path) -> None:
    shards = put(make_set(tmp_path / "set"), {"a.json": SAID, "a.safetensors": packed()})
    index = (shards.folder / "000000.index.json").read_text()
    other = put_index(shards, index.replace('"a"', '"b"'), samples=1)
    with pytest.raises(UserError, match=r"000000\.tar: is not what 000000\.index\.json says"):
        other.verify()


@pytest.mark.parametrize(
    ("change", "tokens", "said"),
    [
        ({}, [2, 5], "it has 6 tokens, the index says 5"),
        ({}, [2], "it has 2 captions, the index says 1"),
        ({"latent": torch.zeros(1, 4, 4).half()}, [2, 6], "`latent` is float16"),
        ({"text.1": torch.zeros(6, 6)}, [2, 6], r"`text\.1` is float32"),
    ],
)
def test_verify_compares_samples_with_form_and_index(
    tmp_path: Path, change: dict[str, torch.Tensor], tokens: list[int], said: str
) -> None:
    shards = put(make_set(tmp_path / "set"), {"a.json": SAID, "a.safetensors": packed(**change)})
    if tokens != [2, 6]:
        index = (shards.folder / "000000.index.json").read_text()
        shards = put_index(shards, index.replace("[2, 6]", json.dumps(tokens)), samples=1)
    with pytest.raises(DataError, match=rf"000000\.tar: sample a cannot be read: {said}"):
        shards.verify()
