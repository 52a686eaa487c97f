"""Batches in the making: memory that is used again, into which samples are read."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from twinflow_train.batch import Batch, Condition
from twinflow_train.data.manifest import Form, LatentShape
from twinflow_train.data.sample import TYPES, Sample, looked_at, not_finite

Block = npt.NDArray[np.uint8]


class Memory:
    """Where batches are put: blocks of memory that nothing holds any more are used again.

    To touch new memory takes ten times as long as to fill it. Where there is a GPU the memory is
    page-locked, and torch does the same.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Block]] = {}

    def take(self, size: int) -> Tensor:
        """Return `size` bytes, whatever is in them."""
        if torch.cuda.is_available():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        free = self._free.setdefault((size - 1).bit_length(), [])
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(1 << (size - 1).bit_length(), dtype=np.uint8)
        # Only torch holds this view, and does while any tensor uses its memory. No lock: this may
        # run at any moment, and append and pop are whole.
        view = block[:size]
        weakref.finalize(view, free.append, block)
        return torch.from_numpy(view)


class Plane:
    """A tensor with a row for each sample, whose bytes can be reached."""

    def __init__(self, memory: Memory, many: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = math.prod(shape) * dtype.itemsize
        found = memory.take(many * size)
        self.tensor = found.view(dtype).view(many, *shape)
        self._bytes: Block = found.view(many, size).numpy()

    def row(self, number: int, size: int) -> memoryview:
        """Return the first bytes of a row, so many, and make the others zeros; OSError if too many.

        They are when a text is longer than its index said, as when the index could not be read.
        """
        row = self._bytes[number]
        if size > len(row):
            raise OSError(f"it takes {size} bytes where its index promised {len(row)}")
        if size < len(row):
            row[size:] = 0
        return memoryview(row[:size])


class Draft:
    """A batch that threads fill, each row by itself.

    lengths: tokens of each row's text. Texts are padded to the longest. Without latents (image-free
    training) the data are zeros.
    """

    def __init__(
        self, lengths: Sequence[int], *, form: Form, latent_shape: LatentShape, memory: Memory
    ) -> None:
        self._lengths = list(lengths)
        latent = TYPES.get(form.latent_dtype, torch.float32)
        text = TYPES[form.text_dtype]
        planes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "latent": (latent_shape, latent),
            "text": ((max(lengths), form.text_width), text),
        }
        if form.pooled_width:
            planes["pooled"] = (form.pooled_width,), text
        planes |= {f"reference.{n}": (latent_shape, latent) for n in range(form.references)}
        self._planes = {
            name: Plane(memory, len(lengths), shape, dtype)
            for name, (shape, dtype) in planes.items()
        }
        if form.latent_dtype == "none":
            self._planes["latent"].tensor.zero_()

    def room(self, row: int, name: str, size: int) -> memoryview:
        """Return where the bytes of a row's tensor go."""
        return self._planes[_plane(name)].row(row, size)

    def not_finite(self, first: int, last: int) -> dict[int, str]:
        """Name a tensor of each of some rows that are filled, if one has numbers that are none."""
        return {
            first + row: name
            for name, plane in self._planes.items()
            if looked_at(name)
            for row in not_finite(plane.tensor[first:last]).nonzero()[0].tolist()
        }

    def replace(self, row: int, sample: Sample) -> None:
        """Put a sample into a row, once nothing else is filled."""
        self._lengths[row] = length = len(sample.text)
        text = self._planes["text"]
        if (missing := length - text.tensor.shape[1]) > 0:
            text.tensor = pad(text.tensor, (0, 0, 0, missing))
        text.tensor[row, length:] = 0
        text.tensor[row, :length] = sample.text
        for name, tensor in sample.tensors().items():
            if not name.startswith("text"):
                self._planes[_plane(name)].tensor[row] = tensor

    def batch(self, null: Condition, keys: Sequence[str], *, skipped: int) -> Batch:
        """Return the batch, once all rows are filled."""
        planes = {name: plane.tensor for name, plane in self._planes.items()}
        references = [tensor for name, tensor in planes.items() if name.startswith("reference")]
        return Batch(
            data=planes["latent"],
            cond=Condition(
                tokens=planes["text"],
                mask=self._mask(planes["text"].shape[1]),
                pooled=planes.get("pooled"),
                references=tuple(references),
            ),
            null=null,
            keys=tuple(keys),
            skipped=skipped,
        )

    def _mask(self, longest: int) -> Tensor | None:
        """Return which tokens are real, None if all are."""
        lengths = np.array(self._lengths)
        if lengths.min() == longest:
            return None
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None])
        return mask.pin_memory() if torch.cuda.is_available() else mask


def _plane(name: str) -> str:
    """Name the plane that a tensor is a row of: of texts and pooled embeddings there is one."""
    return name if name.startswith("reference") else name.partition(".")[0]
