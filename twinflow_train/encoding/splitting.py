"""Which sets a preparation makes: one, or a held-out set and one to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.sources import Item
from twinflow_train.rng import digest

TRAIN, HELDOUT = "train", "heldout"
"""Their folders."""
Wanted = Callable[[Item], bool]
"""Tells whether an item of the source goes into a set."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A set to make: its settings, and what goes into it."""

    settings: Preparation
    wanted: Wanted


def everything(item: Item) -> bool:
    """Tell that an item goes into the only set."""
    return True


def parts(settings: Preparation) -> list[Part]:
    """Return the sets to make, the held-out one first: it is small.

    An item is held out by a hash of its name alone, so it is in every set made of its source. The
    held-out set has one size, since evaluations compare images of one size.
    """
    share = settings.heldout
    if not share:
        return [Part(settings=settings, wanted=everything)]

    def held_out(item: Item) -> bool:
        return digest("held out", item.name) < share * 2**64

    heldout = replace(
        settings, folder=f"{settings.folder}/{HELDOUT}", images=settings.images.of_one_size()
    )
    train = replace(settings, folder=f"{settings.folder}/{TRAIN}")
    return [
        Part(settings=heldout, wanted=held_out),
        Part(settings=train, wanted=lambda item: not held_out(item)),
    ]
