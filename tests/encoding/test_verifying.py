"""What verify=true finds: exact on what it is given, and with a picture of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.encoding.jobs import CPU, codec, pipeline, run, settings
from tests.encoding.test_generated import generated
from tests.encoding.tools import write_folder
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.folder import Folder
from twinflow_train.encoding.pictures import Size, load, scaled
from twinflow_train.encoding.summary import lines
from twinflow_train.encoding.verifying import A_SIZE, psnr
from twinflow_train.encoding.workers import Worker
from twinflow_train.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory)


def test_psnr_is_that_of_known_errors() -> None:
    image = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)
    assert psnr(image, image + 0.2) == pytest.approx(20)
    assert psnr(image, image + 0.02 * torch.ones(8).cumprod(0)) == pytest.approx(40)
    assert psnr(image, image) == pytest.approx(106, abs=0.1)
    one_wrong = image.clone()
    one_wrong[0, 0, 0] += 2
    assert psnr(image, one_wrong) == pytest.approx(10 * torch.tensor(192.0).log10())


def test_decoded_latents_are_compared_with_their_own_pictures(tmp_path: Path, tiny: Path) -> None:
    source = write_folder(tmp_path / "source", range(24))
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(source)), verify=True)
    found = run(prepared).verified
    assert found is not None
    shards, stock = ShardSet(tmp_path / "set"), codec(tiny)
    expected: dict[Size, list[float]] = {}
    for index in range(len(shards)):
        sample = shards.read(index)
        size = Size(*sample.fields["size"])
        original = scaled(load((source / sample.fields["source"]).read_bytes(), size)[1])
        expected.setdefault(size, []).append(psnr(original, stock.decode(sample.image[None])[0]))
    assert found.psnr.keys() == expected.keys()
    assert {size: len(each) for size, each in found.psnr.items()} == {
        Size(64, 64): A_SIZE, Size(80, 48): 6, Size(48, 80): 6
    }  # fmt: skip
    for size, values in found.psnr.items():
        assert all(any(abs(value - one) < 1e-3 for one in expected[size]) for value in values)
        assert len({round(value, 4) for value in values}) > 1
    text = "\n".join(
        lines(run(prepared), prepared, Worker(number=0, count=1, device=CPU, speaks=True))
    )
    for size, values in found.psnr.items():
        mean = sum(values) / len(values)
        assert f"{size}: PSNR {mean:.1f} dB in the mean, {min(values):.1f} at least" in text


def test_the_picture_shows_originals_above_what_was_decoded(tmp_path: Path, tiny: Path) -> None:
    source = write_folder(tmp_path / "source", [0, 4])
    run(settings(tmp_path / "set", tiny, source=Folder(path=str(source)), verify=True))
    with Image.open(tmp_path / "set" / "verify.png") as sheet:
        shown = sheet.convert("RGB")
    with Image.open(source / "even" / "000.png") as original:
        own = original.convert("RGB")
    label, gap = 18, 4
    above = shown.crop((0, label + gap, 64, label + gap + 64))
    assert above.tobytes() == own.tobytes()
    sample = ShardSet(tmp_path / "set").read(0)
    decoded = ((codec(tiny).decode(sample.image[None])[0] + 1) * 127.5).round().to(torch.uint8)
    below = shown.crop((0, label + 2 * gap + 64, 64, label + 2 * gap + 128))
    assert below.tobytes() == decoded.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_generated_latents_are_only_shown(tmp_path: Path, tiny: Path) -> None:
    generated(tmp_path, tiny, verify=True)
    with Image.open(tmp_path / "set" / "verify.png") as sheet:
        assert sheet.height == (18 + 4) + (64 + 4)


def test_only_one_worker_looks(tmp_path: Path, tiny: Path) -> None:
    source = write_folder(tmp_path / "source", range(6))
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(source)), verify=True)
    outcomes = [run(prepared, number, 2) for number in (0, 1)]
    assert [outcome.verified is None for outcome in outcomes] == [True, False]
    again = [run(prepared, number, 2) for number in (0, 1)]
    assert [outcome.verified is None for outcome in again] == [False, True]


def test_an_original_that_is_gone_is_named(tmp_path: Path, tiny: Path) -> None:
    source = write_folder(tmp_path / "source", [0, 4])
    prepared = settings(tmp_path / "set", tiny, source=Folder(path=str(source)))
    run(prepared)
    (source / "even" / "004.txt").write_bytes(b"\xff")
    said = (
        r"verify: even/004\.png is not what it was .*its captions are not UTF-8.*the set is whole"
    )
    with pytest.raises(UserError, match=said):
        run(replace(prepared, verify=True))
