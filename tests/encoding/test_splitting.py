"""A held-out set and one to train on, made of one source by one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.encoding.jobs import CPU, pipeline, settings
from tests.encoding.tools import write_folder
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.folder import Folder
from twinflow_train.encoding.images import NoImages, Stored
from twinflow_train.encoding.job import Outcome, jobs
from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.sources import Item
from twinflow_train.encoding.splitting import parts
from twinflow_train.encoding.workers import Worker
from twinflow_train.errors import UserError
from twinflow_train.models.codec import Codec, PipelineFolder
from twinflow_train.models.qwen_codec import QwenImageEncoders

MANY = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "pictures", range(MANY))


def split(folder: Path, tiny: Path, source: Path, **changes: object) -> Preparation:
    """Hold out a quarter of a folder's pictures."""
    options = {"source": Folder(path=str(source)), "samples_per_shard": 5, "heldout": 0.25}
    return settings(folder, tiny, **options | changes)


def run(prepared: Preparation, number: int = 0, count: int = 1) -> list[Outcome]:
    """Do a worker's part of both sets."""
    worker = Worker(number=number, count=count, device=CPU, speaks=False)
    return [job.run() for job in jobs(prepared, worker)]


def sources(folder: Path) -> list[str]:
    """List which items a set has."""
    shards = ShardSet(folder)
    return [str(shards.read(index).fields["source"]) for index in range(len(shards))]


def test_each_item_is_in_one_of_two_sets(tmp_path: Path, tiny: Path, pictures: Path) -> None:
    outcomes = run(split(tmp_path, tiny, pictures))
    heldout, train = sources(tmp_path / "heldout"), sources(tmp_path / "train")
    lost = [each.name for outcome in outcomes for each in outcome.skipped]
    everything = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    assert sorted(heldout + train + lost) == everything
    assert 4 <= len(heldout) <= 16
    assert [outcome.samples for outcome in outcomes] == [len(heldout), len(train)]
    assert len(ShardSet(tmp_path / "train").manifest.buckets) == 3
    assert ShardSet(tmp_path / "heldout").latent_shape == (16, 8, 8)  # or it could not be used
    for name in ("heldout", "train"):
        ShardSet(tmp_path / name).verify()


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of both sets but the workers' own."""
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("heldout", "train")
        for path in (folder / name).iterdir()
        if path.is_file()
    }


def test_any_workers_make_the_same_two_sets_and_finish_what_is_missing(
    tmp_path: Path, tiny: Path, pictures: Path
) -> None:
    alone, shared = (split(tmp_path / name, tiny, pictures) for name in ("alone", "shared"))
    run(alone)
    heldout, train = run(shared, 1, 3)
    assert heldout.left > 0 < train.left
    with pytest.raises(UserError, match=r"heldout was begun .*: heldout was 0\.25, now 0\.5\."):
        run(replace(shared, heldout=0.5))
    assert [outcome.left for outcome in run(shared)] == [0, 0]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_what_is_held_out_stays_so_when_a_source_grows(tmp_path: Path, tiny: Path) -> None:
    held_out, _ = parts(split(tmp_path, tiny, tmp_path))
    names = [f"odd/{n:05d}.png" for n in range(4000)]
    items = [Item(number=number, where=(name,)) for number, name in enumerate(names)]
    chosen = {item.name for item in items if held_out.wanted(item)}
    assert len(chosen) == pytest.approx(1000, rel=0.1)
    later = [Item(number=7 * item.number, where=item.where) for item in items]
    assert {item.name for item in later if held_out.wanted(item)} == chosen
    fewer, _ = parts(split(tmp_path, tiny, tmp_path, heldout=0.1))
    assert {item.name for item in items if fewer.wanted(item)} < chosen


def test_encoders_are_loaded_once_for_both_sets(
    tmp_path: Path, tiny: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], QwenImageEncoders.open

    def counted(encoders: QwenImageEncoders, found: PipelineFolder, device: torch.device) -> Codec:
        loaded.append(device)
        return load(encoders, found, device)

    monkeypatch.setattr(QwenImageEncoders, "open", counted)
    run(split(tmp_path, tiny, pictures))
    assert len(loaded) == 1


def test_prompts_are_split_too_and_those_held_out_have_the_first_size(
    tmp_path: Path, tiny: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(MANY)))
    prepared = settings(
        tmp_path / "set", tiny, source=Captions(path=str(tmp_path / "prompts.txt")),
        images=NoImages(sizes=[[32, 96], [64, 64]]), heldout=0.3,
    )  # fmt: skip
    run(prepared)
    found = [sources(tmp_path / "set" / name) for name in ("heldout", "train")]
    assert sorted([*found[0], *found[1]]) == sorted(f"prompts.txt:{n}" for n in range(1, MANY + 1))
    assert ShardSet(tmp_path / "set" / "heldout").latent_shape == (16, 4, 12)


def test_a_share_is_a_share(tmp_path: Path, tiny: Path, pictures: Path) -> None:
    for share in (-0.1, 1.0, 20.0):
        with pytest.raises(UserError, match=f"heldout is {share}; it must be a share"):
            split(tmp_path, tiny, pictures, heldout=share)
    with pytest.raises(UserError, match=r"nothing to prepare for .*/heldout: 0 items"):
        run(split(tmp_path, tiny, pictures, heldout=1e-9))


def test_sets_without_a_share_are_what_they_were(tmp_path: Path, tiny: Path) -> None:
    """What they were begun with does not name it."""
    before = split(tmp_path, tiny, tmp_path, heldout=0.0)
    assert "heldout" not in before.identity("r", device=CPU)
    assert [part.settings for part in parts(before)] == [before]
    assert Stored(ratios=[4 / 3]).of_one_size().sizes_for(16) == ((1024, 1024),)


def test_a_share_is_neither_added_to_a_folder_nor_dropped_from_it(
    tmp_path: Path, tiny: Path, pictures: Path
) -> None:
    """Or a sample of one set would also be in the other."""
    whole, parted = (
        split(tmp_path / name, tiny, pictures, heldout=share)
        for name, share in (("whole", 0.0), ("parted", 0.25))
    )
    run(whole, 1, 3)
    with pytest.raises(UserError, match=r"heldout is 0\.25, and .*/whole holds a set of all items"):
        run(replace(whole, heldout=0.25))
    run(parted, 1, 3)
    with pytest.raises(UserError, match=r"heldout is 0, and .*/parted/train holds a part of"):
        run(replace(parted, heldout=0.0))
    for folder in ("whole", "parted/train", "parted/heldout"):
        (tmp_path / folder / "prepare" / "settings.json").unlink()
    assert [outcome.left for outcome in run(whole)] == [0]
    assert [outcome.left for outcome in run(parted)] == [0, 0]


def test_a_share_that_holds_nothing_can_be_corrected(
    tmp_path: Path, tiny: Path, pictures: Path
) -> None:
    with pytest.raises(UserError, match=r"nothing to prepare for .*/heldout"):
        run(split(tmp_path, tiny, pictures, heldout=1e-9))
    assert [outcome.left for outcome in run(split(tmp_path, tiny, pictures))] == [0, 0]
