"""Small tokenizers of the released classes, made here."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

VOCABULARY = 1024
"""More than any of them has."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What a released chat template comes to for one message."""


def qwen(words: str, special: Iterable[str]) -> Qwen2Tokenizer:
    """Train Qwen's byte-level BPE, so that each of the words is one token."""
    plain = Qwen2Tokenizer()._tokenizer
    trainer = BpeTrainer(
        vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    plain.train_from_iterator([words] * 10, trainer)
    model = json.loads(plain.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=list(special),
        model_max_length=131072,
        chat_template=CHAT,
    )


def gemma(words: str) -> GemmaTokenizer:
    """Train Gemma's BPE, so that each of the words is one token."""
    plain = GemmaTokenizer()._tokenizer
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = BpeTrainer(
        vocab_size=1000,
        initial_alphabet=list(string.printable),
        special_tokens=special,
        show_progress=False,
    )
    # Word by word: it would merge a whole sentence into one token.
    plain.train_from_iterator([f" {word}" for word in words.split()] * 10, trainer)
    model = json.loads(plain.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        model_max_length=131072,
    )


def clip() -> CLIPTokenizer:
    """Give CLIP's tokenizer a token for each byte, inside of a word and at its end."""
    alphabet = sorted(ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{byte}</w>" for byte in alphabet)]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        model_max_length=77,
    )


def t5() -> T5Tokenizer:
    """Give T5's tokenizer a token for each printable character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [("\u2581", -2.0), *((letter, -3.0) for letter in string.printable if letter.strip())]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=512)
