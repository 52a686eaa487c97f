"""Batches in the making: memory that is used again, into which samples are read."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from twinflow_train.batch import Batch, Condition
from twinflow_train.data.manifest import Form, LatentShape
from twinflow_train.data.sample import TYPES, Sample, looked_at, not_finite
from twinflow_train.errors import UserError
from twinflow_train.place import cause, readable

Block = npt.NDArray[np.uint8]


class Memory:
    """Where batches are put: blocks of memory that nothing holds any more are used again.

    To touch new memory takes ten times as long as to fill it. Where there is a GPU the memory is
    page-locked, and torch does the same.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Block]] = {}

    def take(self, size: int) -> Tensor:
        """Return `size` bytes, whatever is in them; UserError if there are not so many."""
        try:
            return self._take(size)
        except (MemoryError, RuntimeError) as error:
            raise UserError(
                f"data: {readable(size)} of memory for a part of a batch cannot be had "
                f"({cause(error)}); make micro_batch or data.prefetch smaller"
            ) from error

    def _take(self, size: int) -> Tensor:
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

    lengths: tokens of each row's text and, where rows have their own null prompts, "null". They are
    padded to the longest. Without latents (image-free training) the data are zeros.
    """

    def __init__(
        self,
        lengths: Mapping[str, Sequence[int]],
        *,
        form: Form,
        latent_shape: LatentShape,
        memory: Memory,
    ) -> None:
        self._lengths = {name: list(each) for name, each in lengths.items()}
        self._rows = len(lengths["text"])
        latent = TYPES.get(form.latent_dtype, torch.float32)
        text = TYPES[form.text_dtype]
        planes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "latent": (latent_shape, latent),
        }
        for name, each in lengths.items():
            planes[name] = (max(each), form.text_width), text
        if form.pooled_width:
            planes["pooled"] = (form.pooled_width,), text
        planes |= {f"reference.{n}": (latent_shape, latent) for n in range(form.references)}
        self._planes = {
            name: Plane(memory, self._rows, shape, dtype) for name, (shape, dtype) in planes.items()
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
        for name, tensor in sample.tensors().items():
            if (kind := _plane(name)) in self._lengths:
                self._put(kind, row, tensor)
            else:
                self._planes[kind].tensor[row] = tensor

    def _put(self, name: str, row: int, text: Tensor) -> None:
        """Put a text into a row, and make room if it is longer than all others."""
        self._lengths[name][row] = length = len(text)
        plane = self._planes[name]
        if (missing := length - plane.tensor.shape[1]) > 0:
            plane.tensor = pad(plane.tensor, (0, 0, 0, missing))
        plane.tensor[row, length:] = 0
        plane.tensor[row, :length] = text

    def batch(self, null: Condition, keys: Sequence[str], *, skipped: int) -> Batch:
        """Return the batch, once all rows are filled; null: of rows that have none of their own."""
        planes = {name: plane.tensor for name, plane in self._planes.items()}
        cond = self._condition("text")
        if "null" in planes:
            null = self._condition("null")
        elif cond.references:
            null = replace(null.expand(self._rows), references=cond.references)
        return Batch(
            data=planes["latent"],
            cond=replace(cond, pooled=planes.get("pooled")),
            null=null,
            keys=tuple(keys),
            skipped=skipped,
        )

    def _condition(self, name: str) -> Condition:
        """Return each row's text of a name, beside its references."""
        tokens = self._planes[name].tensor
        references = (one.tensor for key, one in self._planes.items() if key.startswith("ref"))
        return Condition(
            tokens=tokens,
            mask=self._mask(self._lengths[name], tokens.shape[1]),
            references=tuple(references),
        )

    def _mask(self, each: Sequence[int], longest: int) -> Tensor | None:
        """Return which tokens are real, None if all are."""
        lengths = np.array(each)
        if lengths.min() == longest:
            return None
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None])
        return mask.pin_memory() if torch.cuda.is_available() else mask


def _plane(name: str) -> str:
    """Name the plane that a tensor is a row of: of texts and pooled embeddings there is one."""
    return name if name.startswith("reference") else name.partition(".")[0]
