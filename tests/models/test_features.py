"""Feature networks from tiny folders in the released formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from transformers import BitImageProcessorPil, CLIPModel, CLIPTokenizer, Dinov2Model

from tests.evals.digits import images
from tests.pipelines.features import write_clip, write_dinov2, write_inception
from twinflow_train.errors import UserError
from twinflow_train.models.features import CLIP, DINOv2, Features, Inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("features")
    return {
        "clip": write_clip(folder / "clip"),
        "dinov2": write_dinov2(folder / "dinov2"),
        "inception": write_inception(folder / "inception.pt"),
    }


def pictures() -> list[Image.Image]:
    """Real digits, once square and once not."""
    levels = ((images()[0][::700, 0] + 1) * 127.5).round().byte()
    found = [Image.fromarray(each.numpy()).convert("RGB").resize((40, 40)) for each in levels]
    return [*found[:4], *(each.resize((60, 40)) for each in found[4:])]


@pytest.mark.parametrize(
    ("kind", "features"), [(Inception, 48), (DINOv2, 16), (CLIP, 8)], ids=lambda x: str(x)
)
def test_features_see_pictures_and_not_their_neighbours(
    there: dict[str, Path], kind: type[Features], features: int
) -> None:
    net = kind(path=str(there[kind().name])).open(CPU)
    shown = pictures()
    found = net.images(shown)
    assert found.shape == (len(shown), features)
    assert found.dtype == torch.float32
    alone = torch.cat([net.images([each]) for each in shown])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    blurred = net.images([each.filter(ImageFilter.GaussianBlur(4)) for each in shown])
    moved = (found - blurred).norm(dim=1)
    assert bool((moved > 1e-3 * found.norm(dim=1)).all())


def test_dinov2_is_its_class_token(there: dict[str, Path]) -> None:
    (shown,) = pictures()[:1]
    pixels = torch.tensor(list(shown.resize((28, 28), Image.Resampling.BICUBIC).tobytes()))
    pixels = pixels.view(1, 28, 28, 3).permute(0, 3, 1, 2) / 255
    said = BitImageProcessorPil()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (said.image_mean, said.image_std))
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(there["dinov2"])((pixels - mean) / std)
    wanted = hidden.last_hidden_state[:, 0]
    found = DINOv2(path=str(there["dinov2"])).open(CPU).images([shown])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_clip_has_the_stock_models_vectors_of_texts(there: dict[str, Path]) -> None:
    net = CLIP(path=str(there["clip"])).open(CPU)
    texts = ["a red fox", "two blue vases " * 30]
    found = net.texts(texts)
    assert found.shape == (2, 8)
    tokenizer = CLIPTokenizer.from_pretrained(there["clip"])
    with torch.no_grad():
        stock = CLIPModel.from_pretrained(there["clip"])
        wanted = stock.get_text_features(**tokenizer(texts[:1], return_tensors="pt"))
    torch.testing.assert_close(found[:1], wanted.pooler_output, atol=1e-4, rtol=1e-4)
    assert bool(found[1].isfinite().all()), "cut, and not refused"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Inception, "inception-2015-12-05.pt"),
        (DINOv2, "facebook/dinov2-large"),
        (CLIP, "openai/clip-vit-large-patch14"),
    ],
)
def test_weights_that_are_missing_are_one_clear_line(
    tmp_path: Path, kind: type[Features], said: str
) -> None:
    with pytest.raises(UserError, match=rf"features\.path: .*{said}"):
        kind(path=str(tmp_path / "none")).check()


def test_another_network_or_a_damaged_file_is_refused(
    there: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds a dinov2, features=clip was asked for"):
        CLIP(path=str(there["dinov2"])).open(CPU)
    broken = write_clip(tmp_path / "clip")
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be loaded"):
        CLIP(path=str(broken)).open(CPU)
    (tmp_path / "torn.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="no TorchScript file"):
        Inception(path=str(tmp_path / "torn.pt")).open(CPU)
