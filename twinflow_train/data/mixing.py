"""Which sets can be mixed: those whose samples came from the same encoders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from twinflow_train.batch import Condition
from twinflow_train.data.manifest import About
from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError

APART = 0.1
"""How far null prompts may be apart, relative to their size.

One encoder on two kinds of GPU differs by hundredths, another encoder by more than its size.
"""


def refuse_unlike(sets: Sequence[ShardSet]) -> None:
    """Refuse sets that are not made as the first one is, whose null prompt is used: UserError."""
    first, *others = sets
    for one in others:
        if differs := "; ".join(_differences(one, first)):
            raise UserError(
                f"data.mix: {one.place} is not made as {first.place}: {differs}; prepare both with "
                "the same encoders"
            )


def _differences(one: ShardSet, first: ShardSet) -> list[str]:
    here, there = one.manifest, first.manifest
    found = [
        f"{what} is {own!r}, there {other!r}"
        for what, own, other in (
            ("its form", here.form, there.form),
            ("its encoder", _encoder(here.about), _encoder(there.about)),
            ("its null prompt", here.about.null_prompt, there.about.null_prompt),
        )
        if own != other
    ]
    if not found and here.null_sha256 != there.null_sha256 and not _near(one.null, first.null):
        found.append("its null prompt has another embedding")
    return found


def _encoder(about: About) -> str:
    """Identify encoders: weights of one checksum are the same under any name."""
    content = about.revision.startswith("sha256:")
    return about.revision if content else f"{about.encoder}@{about.revision}"


def _near(one: Condition, first: Condition) -> bool:
    pairs = [(one.tokens, first.tokens)]
    if one.pooled is not None and first.pooled is not None:
        pairs.append((one.pooled, first.pooled))
    return all(_apart(own, other) <= APART for own, other in pairs)


def _apart(own: Tensor, other: Tensor) -> float:
    """Return the distance of two tensors relative to the second, infinite between two shapes."""
    if own.shape != other.shape:
        return float("inf")
    own, other = own.double(), other.double()
    return float((own - other).norm() / other.norm())
