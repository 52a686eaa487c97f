"""Blocks through torch.compile: each kind once, with rows and tokens of any number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from twinflow_train.errors import UserError

MOST_GRAPHS = 12
"""Of a kind of block: the student's with gradient and without, and the teacher's; each with padded
texts and without, and for one row and for more."""


def refuse_unknown_backend(name: str | None) -> None:
    """Refuse a backend of torch.compile that is not there: UserError."""
    if name is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise UserError(
            f"engine.compile is {name}; it must be null or one of {', '.join(sorted(known))}"
        )


def compile_blocks(blocks: Sequence[nn.Module], *, backend: str) -> None:
    """Compile what each block computes; its hooks, which gather its weights, stay outside.

    Blocks of a kind share their graphs, as they differ in nothing but their weights.
    """
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    shapes.use_duck_shape = False  # rows that are once as many as heads are not always
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True)
