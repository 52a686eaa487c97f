"""A small classifier, trained on real images: its logits and features judge drawn ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from twinflow_train.data.shards import ShardSet
from twinflow_train.errors import UserError
from twinflow_train.evals import metrics
from twinflow_train.files import save_tensors, whole_file
from twinflow_train.rng import generator

BUILD = "python data/digits.py or python -m data.emoji_few"
"""The commands that build the judges of the built-in sets."""
SHAPE, CLASSES = (1, 28, 28), 10
"""Of a judge whose file does not say what it judges: digits."""

EPOCHS, BATCH, RATE, DECAY = 10, 50, 5e-3, 0.1
LINEAR, SHIFT = 0.12, 0.11
"""Augmentation: the most that is added to the identity map and its shift (1 is half a side)."""


class Judge(nn.Module):
    """Convolutional classifier of small images in [-1, 1] with 64 features before its last layer.

    shape: of an image: channels, height, width. classes: how many it tells apart.
    accuracy: its share of right answers on held-out real images.
    frechet: Frechet distance between training and held-out real images, equally many of each, in
        its features: what a perfect generator reaches.
    """

    def __init__(self, *, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> None:
        # Built without storage: the default initialisation would draw from the global generator.
        super().__init__()
        channels, *sides = shape
        # Halved three times: by the first convolution, which rounds up, and by two poolings.
        high, wide = ((side + 1) // 2 // 4 for side in sides)
        with torch.device("meta"):
            self.body = nn.Sequential(
                *_block(channels, 32, kernel=5, stride=2),
                *_block(32, 48),
                nn.MaxPool2d(2),
                *_block(48, 64),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(64 * high * wide, 64, bias=False),
                nn.BatchNorm1d(64),
                nn.ReLU(),
            )
            self.head = nn.Linear(64, classes)
        self.shape, self.classes = shape, classes
        self.accuracy = math.nan
        self.frechet = math.nan

    def forward(
        self, images: Float[Tensor, "b channels height width"]
    ) -> tuple[Float[Tensor, "b classes"], Float[Tensor, "b 64"]]:
        """Return logits and features."""
        features = self.body(images)
        return self.head(features), features

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a judge that `fit_judge` wrote, ready to judge; UserError if there is none."""
        if not Path(path).is_file():
            raise UserError(f"evals.judge: there is no judge at {path}; build it with: {BUILD}")
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {})["judge"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shape = tuple(said.get("shape", SHAPE))
            judge = cls(shape=shape, classes=said.get("classes", CLASSES))
            judge.load_state_dict(state, assign=True)
            judge.accuracy, judge.frechet = said["accuracy"], said["frechet"]
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"evals.judge: {path} is not a judge; remove it and run: {BUILD}"
            ) from error
        return judge.eval().requires_grad_(False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, and on as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def fit_judge(*, train: ShardSet, heldout: ShardSet, path: Path) -> float:
    """Train a judge on `train`, write it to `path` and return its accuracy on `heldout`.

    On one thread, so that it comes out the same however many cores there are.
    """
    images, labels = labelled(train)
    real, real_labels = labelled(heldout)
    classes = int(labels.max()) + 1
    judge = _initialised(Judge(shape=tuple(images.shape[1:]), classes=classes))
    _fit(judge, images, labels)
    judge.eval()
    with torch.no_grad():
        logits, features = judge(real)
        some = torch.linspace(0, len(images) - 1, min(len(images), len(real))).long()
        distance = metrics.frechet(judge(images[some])[1], features)
    accuracy = metrics.accuracy(logits, real_labels)
    _write(judge, path, accuracy=accuracy, frechet=distance)
    return accuracy


def labelled(
    shards: ShardSet,
) -> tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]]:
    """Read all images of a set and their labels; UserError if a sample has none."""
    samples = [shards.read(i) for i in range(len(shards))]
    if missing := [sample.key for sample in samples if "label" not in sample.fields]:
        raise UserError(f"{shards.folder}: sample {missing[0]} has no field `label` to judge it by")
    labels = [int(sample.fields["label"]) for sample in samples]
    return torch.stack([sample.image.float() for sample in samples]), torch.tensor(labels)


def _initialised(judge: Judge) -> Judge:
    """Give a judge parameters that are functions of their names alone."""
    judge.to_empty(device="cpu")
    for name, module in judge.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(
                module.weight, a=math.sqrt(5), generator=generator("judge", name)
            )
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()
    return judge


def _block(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    """Make a convolution with its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def _fit(judge: Judge, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> None:
    """Train on randomly bent images with a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=DECAY)
    per_epoch = max(len(images) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * per_epoch)
    for epoch in range(EPOCHS):
        draws = generator("judge", "epoch", epoch)
        order = torch.randperm(len(images), generator=draws)
        for rows in order.tensor_split(per_epoch):
            logits, _ = judge(_bent(images[rows], draws))
            loss = nn.functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _bent(images: Float[Tensor, "b c h w"], draws: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Apply to each image a small random affine map."""
    amounts = torch.tensor([LINEAR, LINEAR, SHIFT]).expand(2, 3)
    draw = 2 * torch.rand(len(images), 2, 3, generator=draws) - 1
    maps = torch.eye(2, 3) + amounts * draw
    places = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, places, padding_mode="border", align_corners=False)


def _write(judge: Judge, path: Path, *, accuracy: float, frechet: float) -> None:
    """Write a judge as safetensors, whole or not at all; the same judge gives the same bytes."""
    said: dict[str, object] = {"accuracy": accuracy, "frechet": frechet}
    if (judge.shape, judge.classes) != (SHAPE, CLASSES):
        said |= {"shape": judge.shape, "classes": judge.classes}
    with whole_file(path) as unfinished:
        # One entry: safetensors writes several in random order.
        save_tensors(
            judge.state_dict(),
            unfinished,
            metadata={"judge": json.dumps(said)},
        )
