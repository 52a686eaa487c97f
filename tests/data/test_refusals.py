"""What a crafted or damaged set says is not believed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.data.tools import make_sample, make_set
from twinflow_train.data.batching import Draft, Memory
from twinflow_train.data.cache import Cache
from twinflow_train.data.loader import Part, Shards
from twinflow_train.data.manifest import Form
from twinflow_train.data.ranges import Remote
from twinflow_train.data.sample import fields_of, form_of, parse, tensors_of
from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError
from twinflow_train.place import Place


def header_with(**latent: Any) -> bytearray:
    """Return a sample's tensors whose header says something else of the latent."""
    found = tensors_of(make_sample(0))
    size = int.from_bytes(found[:8], "little")
    said = json.loads(found[8 : 8 + size])
    said["latent"] |= latent
    header = json.dumps(said).encode()
    return bytearray(len(header).to_bytes(8, "little") + header + found[8 + size :])


@pytest.mark.parametrize(
    "said",
    [
        {"shape": [1.0, 4, 4]},
        {"shape": [True, 4, 4]},
        {"shape": [-1, -4, 4]},
        {"data_offsets": [0.0, 64]},
        {"data_offsets": [-64, 0]},
    ],
)
def test_a_header_of_other_numbers_than_counts_is_a_value_error(said: dict[str, Any]) -> None:
    sample = make_sample(0)
    with pytest.raises(ValueError, match="a tensor"):
        parse(
            "s",
            header_with(**said),
            fields_of(sample),
            caption=0,
            form=form_of(sample),
            latent_shape=(1, 4, 4),
        )


@pytest.mark.parametrize(
    "change",
    [
        {"file": ".."},
        {"file": ""},
        {"file": "manifest.json"},
        {"file": "x.tar?a=1"},
        {"file": "000001.tar"},  # twice
        {"latent_shape": []},
        {"latent_shape": [4, 4]},
        {"latent_shape": [1, 4, 10**6]},
        {"latent_shape": [1, 4, 10**30]},
        {"samples": 10**6},
        {"samples": 10**12, "bytes": 10**18},
        {"latent_shape": [1, 10**6, 10**6], "bytes": 10**18},
    ],
)
def test_a_manifest_with_odd_names_or_shapes_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    shards = make_set(tmp_path / "set")
    path = shards.folder / "manifest.json"
    said = json.loads(path.read_text())
    said["shards"][0] |= change
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match="not a manifest"):
        ShardSet(shards.folder)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("form", {"references": 65}),
        ("form", {"references": 10**12}),
        ("form", {"text_width": 10**12}),
        ("form", {"text_width": 60_000}),
        ("form", {"pooled_width": 60_000}),
        ("form", {"latent_dtype": "none", "references": 1}),
        ("about", {"revision": 1}),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(
    tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    """Or memory for it would be asked for."""
    shards = make_set(tmp_path / "set")
    path = shards.folder / "manifest.json"
    said = json.loads(path.read_text())
    said[part] |= change
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match="not a manifest"):
        ShardSet(shards.folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"text.0": torch.ones(3, 7)},
        {"text.0": torch.ones(0, 6)},
        {"text.0": torch.ones(6)},
        {"text.0": torch.ones(3, 6).bool()},
        {"other": torch.ones(3, 6)},
    ],
)
def test_a_null_prompt_unlike_the_texts_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shards = make_set(tmp_path / "set")
    path = shards.folder / "manifest.json"
    said = json.loads(path.read_text())
    null = save(tensors)
    (shards.folder / "null.safetensors").write_bytes(null)
    path.write_text(json.dumps(said | {"null_sha256": hashlib.sha256(null).hexdigest()}))
    with pytest.raises(UserError, match=r"null\.safetensors: not a null prompt"):
        ShardSet(shards.folder).null  # noqa: B018 - it is read when it is asked for


def test_memory_that_cannot_be_had_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"GiB of memory .* cannot be had .*make micro_batch"):
        Memory().take(1 << 60)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_weights_and_caches_are_finite(value: float) -> None:
    for key in ("weight", "cache_gb"):
        with pytest.raises(UserError, match=rf"data\.{key} is {value}; it must be positive"):
            replace(Shards(), **{key: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.mix\.weight is"):
        Part(weight=value)


def test_json_too_deep_to_read_is_no_manifest(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    (shards.folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a manifest"):
        ShardSet(shards.folder)


def test_a_text_longer_than_its_index_said_is_not_cut() -> None:
    form = Form(latent_dtype="float32", text_width=6, text_dtype="float32")
    draft = Draft({"text": [2, 1]}, form=form, latent_shape=(1, 4, 4), memory=Memory())
    assert len(draft.room(0, "text.0", 2 * 6 * 4)) == 48
    with pytest.raises(OSError, match="72 bytes where its index promised 48"):
        draft.room(1, "text.0", 3 * 6 * 4)


def test_only_what_it_should_be_is_kept_of_a_small_file(tmp_path: Path) -> None:
    file, good = tmp_path / "index.json", b"the index"
    digest = hashlib.sha256(good).hexdigest()
    cache = Cache(folder=tmp_path / "cache", limit=1_000)
    remote = Remote(place=Place.of(file), sha256=digest, cache=cache, attempts=1)
    file.write_bytes(b"please log in")
    assert remote.whole() == b"please log in"
    file.write_bytes(good)
    assert remote.whole() == good
    file.unlink()
    assert remote.whole() == good
