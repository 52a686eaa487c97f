"""Products of blocks in 8 bits, by torchao."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from twinflow_train.errors import UserError

MULTIPLE = 16
"""What the sizes of a product have to divide by."""


def to_fp8(blocks: Sequence[nn.Module], *, emulate: bool) -> None:
    """Let the linear layers of blocks multiply in float8, with a scale for each whole tensor.

    Weights stay what they are, by name and type; their gradients too. emulate: round as a GPU
    would, and multiply in the usual type.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError("engine.fp8 needs torchao: pip install 'twinflow-train[lowbit]'") from error
    # Tokens are of any number, and are what the gradient of a weight sums over.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    """Leave out what is of other sizes, and modulations, whose rows are as few as samples."""
    sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
    return all(size % MULTIPLE == 0 for size in sizes) and "_mod" not in name
