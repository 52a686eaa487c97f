"""Which activations are kept for the backward pass, and which are computed anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.attention.varlen
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
]
"""Matrix products and attention: most of the arithmetic, a small part of the activations."""


def recompute_every(n: int, blocks: int, *, keep_products: bool = False) -> Callable[..., object]:
    """Return a caller of blocks, asked in turn, that recomputes every n-th in the backward pass.

    keep_products: keep what PRODUCTS gave, and recompute only the rest of the block.
    """
    turns = count()
    context = partial(create_selective_checkpoint_contexts, PRODUCTS)
    options: dict[str, Any] = {"context_fn": context} if keep_products else {}

    def call(block: Callable[..., object], *inputs: Any) -> object:
        if next(turns) % blocks % n:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, **options)

    return call
