"""What there is to sample with at a place: weights, their model, their encoders and settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twinflow_train.batch import Velocity
from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import Sampler, Style, published
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Encoders
from twinflow_train.models.families import encoders_of
from twinflow_train.models.hub import REPOSITORY, located, read_index
from twinflow_train.models.loading import filled
from twinflow_train.models.weights import read_config
from twinflow_train.reporting import card
from twinflow_train.run import GROUPS, model_of
from twinflow_train.runfolder import MANIFEST

BASE = Sampler(style=Style.multi, steps=50, guidance=4.0)
"""How a pretrained base is sampled where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Weights, and what belongs to them.

    folder: of the transformer, or of the pipeline or export around it. encoders: to go with it.
    samplers: settings that travel with the weights, the usual ones first; none for a base.
    latent: shape (C, H, W) of the first size it was trained on, where that is known.
    key: of the configuration, that named the place.
    """

    folder: Path
    model: Model
    encoders: Encoders
    samplers: tuple[Sampler, ...]
    latent: tuple[int, ...] | None
    key: str

    def network(self, *, device: torch.device, dtype: torch.dtype) -> Velocity:
        """Load the network whole; UserError if files are missing, damaged or of another model."""
        try:
            weights = self.model.stored_weights(self.folder)
            net = filled(self.model, weights, device=device, dtype=dtype)
        except UserError as error:
            raise UserError(str(error).replace("init_from", self.key, 1)) from error
        return net if self.samplers else self.model.pretrained(net)

    def sampler(self, *, steps: int | None = None, style: Style | None = None) -> Sampler:
        """Choose settings: those that travel with the weights, else the published ones."""
        usual = self.samplers[0] if self.samplers else BASE
        wanted = style or usual.style
        for known in (*self.samplers, *([] if self.samplers else [BASE])):
            if known.style is wanted and known.steps == (steps or known.steps):
                return known
        if not self.samplers and wanted is Style.multi:
            return replace(BASE, steps=steps or BASE.steps)
        return published(wanted, steps or usual.steps)


def find(
    where: str, *, model: Model | None = None, encoders: Encoders | None = None, key: str = "from"
) -> Origin:
    """Find what there is at a place: a run, an export, a diffusers folder or a repository.

    model, encoders: what they are, where that cannot be told from the place. key: of the
    configuration, for messages.

    Raises:
        UserError: there is nothing to sample with, or it cannot be told what it is.
    """
    folder = _exported(located(where, key=key), key)
    if not folder.exists():
        raise UserError(
            f"{key}: {folder} does not exist; give a run, an export, a diffusers folder or a "
            "repository of the Hugging Face hub"
        )
    said = card.read_model(folder)
    if model is None:
        model = model_of(said["model"]) if said else _matching(folder, key)
    if encoders is None:
        encoders = _encoders(where, folder, model, said)
    few = (folder / card.SETTINGS).is_file()
    samplers = tuple(card.read_samplers(folder)) if few else ()
    if not samplers and model.in_few_steps(folder):
        samplers = tuple(published(Style.few, steps) for steps in (1, 2, 4))
    return Origin(
        folder=folder,
        model=model,
        encoders=encoders,
        samplers=samplers,
        latent=tuple(said["latent_shapes"][0]) if said and "latent_shapes" in said else None,
        key=key,
    )


def _exported(folder: Path, key: str) -> Path:
    """Return a run's newest export; anything else as it is."""
    if not (folder / MANIFEST).is_file():
        return folder
    there = [folder / "export", *sorted(folder.glob("export-*"), reverse=True)]
    exports = [each for each in there if (each / card.MODEL).is_file()]
    # Of a LoRA's run: those that are merged into the base.
    whole = [each for each in exports if (each / "transformer").is_dir()]
    for export in (*whole, *exports):
        return export
    raise UserError(
        f"{key}: the run {folder} has no export yet; make one of its newest checkpoint with "
        f"`python -m twinflow_train.export {folder}`"
    )


def _matching(folder: Path, key: str) -> Model:
    """Find the released model that a folder's configuration describes."""
    for option in GROUPS["model"].values():
        if option.describes(folder):
            found: Model = option
            return found
    said = read_config(folder)
    if not said:
        raise UserError(
            f"{key}: {folder} has no config.json: it is no run, no export and no diffusers folder"
        )
    raise UserError(
        f"{key}: {folder} is a {said.get('_class_name')} of no released size; say what it is with "
        "model=OPTION model.KEY=..."
    )


def _encoders(where: str, folder: Path, model: Model, said: dict[str, Any] | None) -> Encoders:
    """Choose the encoders: of the place itself if it is a pipeline, else those of the data."""
    found = encoders_of(model, made_by=said["encoder"] if said else "")
    name, _, revision = where.partition("@")
    if not Path(where).exists() and "vae" in read_index(folder):
        return replace(found, path=name, revision=revision or None)
    if (folder / "vae").is_dir():
        return replace(found, path=str(folder))
    if said and REPOSITORY.fullmatch(said["encoder"]) and found.path:
        commit = None if said["revision"].startswith("sha256:") else said["revision"]
        return replace(found, path=said["encoder"], revision=commit)
    return found
