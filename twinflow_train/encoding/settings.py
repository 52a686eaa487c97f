"""A preparation as configuration, and what of it defines the set that comes out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from twinflow_train.data.manifest import VERSION
from twinflow_train.encoding.images import Images
from twinflow_train.encoding.sources import Source
from twinflow_train.engines.base import Precision
from twinflow_train.errors import UserError
from twinflow_train.files import whole_file
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Encoders

KEEPING = "prepare"
"""Folder inside a set's, of what its preparation keeps there and training does not read."""
SETTINGS = "settings.json"
TO_BE_GIVEN: Any = "???"
"""What the configuration calls a value that has to be given."""


@dataclass(kw_only=True)
class Preparation:
    """Sources to shards.

    folder: of the set that is made. samples_per_shard: all of one size. latents, texts: types in
    which they are stored. licence: a note on the licence of pictures and captions, for the
    manifest. batch: items encoded at once. loaders: threads that read and decode pictures. verify:
    at the end, decode some latents and compare them with their pictures. heldout: the share of the
    items, chosen by a hash of their names, that make a held-out set in FOLDER/heldout; the others
    make one to train on in FOLDER/train. 0: all make one in FOLDER. model: of the base that
    generates, with images=generated.
    """

    folder: str = "???"
    samples_per_shard: int = 500
    latents: Precision = Precision.fp32
    texts: Precision = Precision.bf16
    licence: str = "not stated"
    batch: int = 8
    loaders: int = 8
    verify: bool = False
    heldout: float = 0.0
    source: Source = TO_BE_GIVEN
    images: Images = TO_BE_GIVEN
    encoders: Encoders = TO_BE_GIVEN
    model: Model = TO_BE_GIVEN

    def __post_init__(self) -> None:
        for key in ("samples_per_shard", "batch", "loaders"):
            if self.__dict__[key] < 1:
                raise UserError(f"{key} is {self.__dict__[key]}; it must be at least 1")
        if not 0 <= self.heldout < 1:
            raise UserError(f"heldout is {self.heldout}; it must be a share: 0 or more, below 1")
        if self.images.pictures and not self.source.pictures:
            raise UserError(
                "the source has captions and no pictures: choose images=none (for image-free "
                "training) or images=generated (the base model makes them)"
            )
        if self.source.pictures and not self.images.pictures:
            raise UserError(
                "the source has pictures: choose images=stored, or source=captions to leave them "
                "out"
            )
        self._check_references()
        if self.verify and not self.images.latents:
            raise UserError("verify=true decodes latents, and images=none has none: leave it out")

    def _check_references(self) -> None:
        """Refuse reference images that nobody looks at, or that are missing: UserError."""
        many = self.source.references
        if many and not self.encoders.edits:
            raise UserError(
                f"source.references is {many}, and these encoders look at 0: choose "
                "encoders=qwen_image_edit, or leave it out"
            )
        if self.encoders.edits and not many:
            raise UserError(
                "source.references is 0, and these encoders look at 1 or more: give "
                "source.references=1, and a picture NAME.ref0.png for each NAME.png"
            )
        if many and not self.images.pictures:
            raise UserError(
                f"source.references is {many}, and only images=stored has reference images: choose "
                "it and a source with pictures"
            )

    @property
    def keeping(self) -> Path:
        """Where plan, settings and the shards' records are kept."""
        return Path(self.folder) / KEEPING

    def identity(self, revision: str, *, device: torch.device) -> dict[str, Any]:
        """Name what defines the set: how it is made; not by whom, how fast or where.

        revision: of the encoders' weights, which may lie anywhere. device: on whose kind the type
        in which they compute depends.
        """
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=lambda e: e.name))
        for key in ("folder", "batch", "loaders", "verify"):
            del plain[key]
        if not self.heldout:
            del plain["heldout"]
        if not self.images.generates:
            del plain["model"]
        if not self.source.references:
            for key in ("references", "reference"):
                plain["source"].pop(key, None)
        plain["images"].pop("init_from", None)
        plain["images"]["weights"] = self.images.weights()
        plain["encoders"] = {"revision": revision, "device": device.type}
        plain["source"]["path"] = os.path.abspath(self.source.path)
        for key in ("source", "images"):
            plain[key]["_type"] = type(self.__dict__[key]).__name__
        return dict(_flat(plain | {"format": VERSION}))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf; what a part is stands under the part's own key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix.rstrip(".") if key == "_type" else f"{prefix}{key}", value


def _one_place(key: str, *settings: Mapping[str, Any]) -> bool:
    """Tell whether a key names the same place in all settings, in whatever words."""
    places = [said.get(key) for said in settings if key == "source.path"]
    return len({os.path.realpath(path) for path in places if isinstance(path, str)}) == 1


def settle(keeping: Path, identity: dict[str, Any]) -> None:
    """Write down what defines the set, or compare it with what was written when it was begun.

    Raises:
        UserError: it has changed; names each key with both values.
    """
    path = keeping / SETTINGS
    if not path.exists():
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(identity, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare into another folder=") from error
    changed = [
        key
        for key in (before | identity)
        if before.get(key) != identity.get(key) and not _one_place(key, before, identity)
    ]
    if changed:
        said = "; ".join(f"{key} was {before.get(key)}, now {identity.get(key)}" for key in changed)
        raise UserError(
            f"folder: {keeping.parent} was begun with other settings: {said}. Keep those, or "
            "choose another folder="
        )
