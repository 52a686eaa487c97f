"""Small real Qwen-Image networks, and inputs for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from twinflow_train.batch import Condition
from twinflow_train.models.codec import Codec, Length
from twinflow_train.models.qwen_image import QwenImage, QwenImageNet
from twinflow_train.models.weights import Weights

SMALL = QwenImage(layers=2, heads=2, head_dim=8, text_width=12, channels=4, rope=[4, 2, 2])
HEIGHT, WIDTH = 4, 6


def check_length(codec: Codec, most: int) -> None:
    """Hold that `length` tells what is cut: of a text that fits every word counts.

    The last word of one that is too long does not.
    """

    def said(words: int) -> Length:
        found = codec.length(" ".join(["red"] * words))
        assert found is not None
        return found

    def last_word_counts(words: int) -> bool:
        texts = [" ".join([*["red"] * (words - 1), last]) for last in ("red", "size")]
        one, other = codec.embed(texts, at_once=1)
        return one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)

    assert said(1).most == most
    fits = max(words for words in range(1, most + 1) if said(words).tokens <= most)
    assert last_word_counts(fits)
    assert said(2 * fits).tokens > most
    assert not last_word_counts(2 * fits)


def stock_model(size: QwenImage = SMALL, **changes: Any) -> QwenImageTransformer2DModel:
    """Build the stock class with its own random initial values, biases and norms moved too."""
    config = {key: value for key, value in size.config().items() if not key.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = QwenImageTransformer2DModel(**(config | changes))
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return stock.eval()


def save_stock(folder: Path, **settings: Any) -> QwenImageTransformer2DModel:
    """Save the stock model as its own class does and return it."""
    stock = stock_model()
    stock.save_pretrained(folder, **settings)
    return stock


def filled(weights: Weights, size: QwenImage = SMALL) -> QwenImageNet:
    """Build our network on the CPU with the values of `weights`."""
    net = size.build().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            shape = parameter.shape
            parameter.copy_(weights.read(net.stored_name(name), shape, 0, shape[0]))
    return net


def loose_second_embedder(net: QwenImageNet) -> QwenImageNet:
    """Move the second time embedder away from its start, the copy of the first."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.stock.time_text_embed.embed_r.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return net


def latents(rows: int, seed: int = 0, size: QwenImage = SMALL) -> Tensor:
    """Draw latents whose height and width differ."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size.channels, HEIGHT, WIDTH, generator=draws)


def texts(*lengths: int, seed: int = 0, size: QwenImage = SMALL) -> Condition:
    """Draw unpadded text embeddings of these lengths and pad them."""
    draws = torch.Generator().manual_seed(seed)
    return Condition.pad([torch.randn(n, size.text_width, generator=draws) for n in lengths])


def garbage_padding(cond: Condition, tokens: int) -> Condition:
    """Pad to `tokens` tokens and fill everything masked with large numbers."""
    longer = cond.padded(tokens)
    mask = longer.full_mask()
    return replace(longer, tokens=torch.where(mask[..., None], longer.tokens, 50.0), mask=mask)
