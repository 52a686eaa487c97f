"""Latents that the base model generates, against the stock transformer stepped by hand."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from tests.encoding.jobs import codec, pipeline, run, settings
from tests.pipelines.qwen_image import SIZE
from twinflow_train.data.shards import ShardSet
from twinflow_train.encoding.captions import Captions
from twinflow_train.encoding.generated import Generated
from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import Sampler, Style, grid
from twinflow_train.models.qwen_image import pack, unpack
from twinflow_train.rng import generator

PROMPTS = ["a red apple", "the size and the color of a horse", "text"]
GUIDED = Sampler(style=Style.multi, steps=3, guidance=3.0, kumaraswamy=[1.17, 0.8, 1.1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory)


def generated(tmp_path: Path, tiny: Path, name: str = "set", **changes: Any) -> ShardSet:
    """Prepare a set of the three prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    images: dict[str, Any] = {"init_from": str(tiny), "sizes": [[64, 32]], "sampler": GUIDED}
    others = {
        key: changes.pop(key) for key in ("batch", "samples_per_shard", "verify") if key in changes
    }
    run(
        settings(
            tmp_path / name,
            tiny,
            source=Captions(path=str(tmp_path / "prompts.txt")),
            images=Generated(**(images | changes)),
            **others,
        )
    )
    return ShardSet(tmp_path / name)


@torch.no_grad()
def by_hand(tiny: Path, number: int, *, seed: int = 0) -> Tensor:
    """Step one prompt from its noise to its latent with the stock transformer."""
    stock = QwenImageTransformer2DModel.from_pretrained(tiny / "transformer")
    found = codec(tiny).embed([PROMPTS[number], "Generate an image."], at_once=1)
    prompt, null = (embedding.tokens for embedding in found)
    x = torch.randn(16, 8, 4, generator=generator("prepare", "start", seed, number))[None].double()

    def velocity(t: float, text: Tensor) -> Tensor:
        tokens = stock(
            hidden_states=pack(x.float(), 2), encoder_hidden_states=text[None],
            timestep=torch.tensor([t]), img_shapes=[[(1, 4, 2)]], return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, 2, 4, 2).double()

    for t, t_next in pairwise(grid(GUIDED).tolist()):
        without = velocity(t, null)
        x = x + (t_next - t) * (without + 3.0 * (velocity(t, prompt) - without))
    return x[0].float()


def test_latents_are_those_that_the_stock_model_generates(tmp_path: Path, tiny: Path) -> None:
    shards = generated(tmp_path, tiny)
    shards.verify()
    for number in range(3):
        sample = shards.read(number)
        assert sample.caption == PROMPTS[number]
        assert sample.fields["size"] == [64, 32]
        torch.testing.assert_close(sample.image, by_hand(tiny, number), rtol=1e-3, atol=1e-3)


def test_an_image_depends_on_its_number_and_the_seed_alone(tmp_path: Path, tiny: Path) -> None:
    together = generated(tmp_path, tiny, "together", batch=3)
    alone = generated(tmp_path, tiny, "alone", batch=1, samples_per_shard=1)
    other = generated(tmp_path, tiny, "other", seed=1)
    for number in range(3):
        images = [shards.read(number).image for shards in (together, alone, other)]
        torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-3)
        assert float((images[2] - images[0]).abs().mean()) > 0.1


def test_fresh_noise_is_drawn_where_the_sampler_wants_it(tmp_path: Path, tiny: Path) -> None:
    noisy = Sampler(style=Style.multi, steps=3, sde=True)
    plain = Sampler(style=Style.multi, steps=3)
    first, second = (
        generated(tmp_path, tiny, name, sampler=sampler).read(0).image
        for name, sampler in (("noisy", noisy), ("plain", plain))
    )
    assert float((first - second).abs().mean()) > 0.1


def test_what_is_written_beside_the_pictures_decodes(tmp_path: Path, tiny: Path) -> None:
    sample = generated(tmp_path, tiny).read(0)
    assert codec(tiny).decode(sample.image[None]).shape == (1, 3, 64, 32)


def test_a_base_that_does_not_fit_is_refused_by_key(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"init_from: .*nowhere does not exist"):
        generated(tmp_path, tiny, "missing", init_from=str(tmp_path / "nowhere"))
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = other / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 9}))
    with pytest.raises(UserError, match=f"num_layers is 9, the configuration's is {SIZE.layers}"):
        generated(tmp_path, tiny, "larger", init_from=str(other))


def test_the_model_s_size_is_part_of_what_is_continued(tmp_path: Path, tiny: Path) -> None:
    generated(tmp_path, tiny)
    with pytest.raises(UserError, match=r"images\.seed was 0, now 1"):
        generated(tmp_path, tiny, seed=1)
    with pytest.raises(UserError, match=r"images\.sampler\.steps was 3, now 4"):
        generated(tmp_path, tiny, sampler=Sampler(style=Style.multi, steps=4, guidance=3.0,
                                                  kumaraswamy=[1.17, 0.8, 1.1]))  # fmt: skip


def test_a_set_goes_on_with_the_same_weights_from_anywhere(tmp_path: Path, tiny: Path) -> None:
    generated(tmp_path, tiny)
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    assert len(generated(tmp_path, tiny, init_from=str(moved))) == 3
    assert len(generated(tmp_path, tiny, init_from=str(moved / "transformer"))) == 3
    (file,) = (moved / "transformer").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"images\.weights was sha256:"):
        generated(tmp_path, tiny, init_from=str(moved))
