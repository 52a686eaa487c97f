"""The published TwinFlow-Z-Image weights' own convention: for sampling, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.families import FAMILIES, filled
from tests.test_run import composed
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.models.two_times import TargetTime
from twinflow_train.models.z_image import Convention, ZImage

FAMILY = FAMILIES["z_image"]
SMALL: Any = FAMILY.small
RELEASED: ZImage = replace(SMALL, convention=Convention.released)
FILE = "diffusion_pytorch_model.safetensors"
SECOND = {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write weights as they are published: stock names, and `t_embedder_2`'s beside them."""
    folder = tmp_path_factory.mktemp("published") / "transformer"
    FAMILY.stock_model().save_pretrained(folder)
    tensors, noise = load_file(folder / FILE), torch.Generator().manual_seed(2)
    for name in SECOND:
        first = tensors[f"t_embedder.{name}"]
        tensors[f"t_embedder_2.{name}"] = torch.randn(first.shape, generator=noise) / 8
    save_file(tensors, folder / FILE)
    config = folder / "config.json"
    # Saved by a class of the authors' own.
    text = config.read_text()
    config.write_text(text.replace("ZImageTransformer2DModel", "ZImageTransformer2DModelWrapper"))
    return folder.parent


def embedders(published: Path) -> tuple[TimestepEmbedder, TimestepEmbedder]:
    """Load both stock embedders by their published names."""
    tensors = load_file(published / "transformer" / FILE)
    found = []
    for name in ("t_embedder", "t_embedder_2"):
        embedder = TimestepEmbedder(16, mid_size=1024)
        embedder.load_state_dict({inner: tensors[f"{name}.{inner}"] for inner in SECOND})
        found.append(embedder)
    return found[0], found[1]


@torch.no_grad()
def test_times_are_embedded_as_the_published_network_embeds_them(published: Path) -> None:
    net = filled(RELEASED, RELEASED.stored_weights(published))
    first, second = embedders(published)
    seen: list[Tensor] = []
    net.stock.t_embedder.register_forward_hook(lambda module, args, out: seen.append(out))
    t, r = torch.tensor([0.75, 0.5, -0.25, 1.0]), torch.tensor([0.25, 0.5, -0.25, 0.0])
    net(FAMILY.latents(4), t, r, FAMILY.texts(2, 2, 2, 2))
    # By hand: a model time is what is left to 1, with the sign of the time; of 0 there is no sign.
    own, target = torch.tensor([0.25, 0.5, -0.75, 0.0]), torch.tensor([0.75, 0.5, -0.75, 0.0])
    gap = torch.tensor([0.5, 0.0, 0.0, 0.0])
    expected = first(1000 * own.abs()) + gap[:, None] * second(1000 * (target - own))
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    assert float(seen[0][0].sub(first(1000 * own[:1].abs())[0]).abs().max()) > 0.1


@torch.no_grad()
def test_fake_times_look_like_real_ones(published: Path) -> None:
    net = filled(RELEASED, RELEASED.stored_weights(published))
    x, cond, t = FAMILY.latents(3), FAMILY.texts(3, 2, 4), torch.tensor([0.9, 0.6, 0.1])
    real = net(x, t, t, cond)
    assert torch.equal(net(x, -t, -t, cond), real)
    torch.testing.assert_close(real, FAMILY.ask(FAMILY.stock_model(), x, t, cond))
    assert not torch.allclose(net(x, t, t / 2, cond), real)


def test_published_weights_are_told_from_a_base(published: Path) -> None:
    for folder, expected in ((published, RELEASED), (FAMILY.folder, SMALL)):
        assert [model for model in (SMALL, RELEASED) if model.describes(folder)] == [expected]
    assert not RELEASED.describes(FAMILIES["sd3"].folder)


def test_to_train_with_it_is_refused() -> None:
    assert not SMALL.untrainable
    words = ("steps=1", "batch=8", "micro_batch=8", "init_from=x", "data.path=a", "data.heldout=b")
    run = composed("model=z_image", "model.convention=released", *words)
    with pytest.raises(UserError, match=r"convention=released is for sampling with published"):
        run.check(World(rank=0, size=1, device=torch.device("cpu")))


def test_weights_without_a_second_embedder_are_not_published_ones() -> None:
    with pytest.raises(
        UserError, match=r"has no t_embedder_2, .* leave model\.convention=released"
    ):
        RELEASED.stored_weights(FAMILY.folder)


def test_weights_of_another_family_are_refused() -> None:
    with pytest.raises(UserError, match=r"is another model: its "):
        RELEASED.stored_weights(FAMILIES["sana"].folder)


def test_it_has_its_own_way_for_two_times() -> None:
    with pytest.raises(ValueError, match=r"released has a second embedder: .*target_time out"):
        replace(RELEASED, target_time=TargetTime.shift)
