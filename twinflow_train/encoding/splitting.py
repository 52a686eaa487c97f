"""Which sets a preparation makes: one, or a held-out set and one to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from twinflow_train.data.manifest import NAME
from twinflow_train.encoding.plan import PLAN
from twinflow_train.encoding.settings import KEEPING, SETTINGS, Preparation
from twinflow_train.encoding.sources import Item
from twinflow_train.errors import UserError
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

    Raises:
        UserError: the folder holds sets that were begun with a held-out one, and now there is to be
            none, or the other way round: items would be in both.
    """
    share = settings.heldout
    _refuse_leaks(settings)
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


def _refuse_leaks(settings: Preparation) -> None:
    """Refuse a set of everything beside one of what was held out of it: UserError."""
    folder = Path(settings.folder)
    if settings.heldout and _begun(folder):
        raise UserError(
            f"heldout is {settings.heldout}, and {folder} holds a set of all items, those that "
            "would be held out too: choose another folder=, or leave heldout out"
        )
    split = [folder / name for name in (TRAIN, HELDOUT) if _begun(folder / name)]
    if split and not settings.heldout:
        raise UserError(
            f"heldout is 0, and {split[0]} holds a part of the items, split off by heldout: give "
            "the same heldout again, or choose another folder="
        )


def _begun(folder: Path) -> bool:
    """Tell whether a folder holds a set, whole or not."""
    return any(
        (folder / name).exists() for name in (NAME, f"{KEEPING}/{SETTINGS}", f"{KEEPING}/{PLAN}")
    )
