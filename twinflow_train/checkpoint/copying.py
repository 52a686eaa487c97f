"""This rank's part of the state, copied to host memory while training stands still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from twinflow_train.checkpoint.ranges import Piece, header
from twinflow_train.engines.base import Span
from twinflow_train.place import CHUNK

BLOCK = 1 << 28
"""Bytes of host memory that are asked for at once; pinned memory comes in powers of two."""


def key_of(span: Span) -> str:
    """Name the tensor that a span is part of, as files do."""
    return f"{span.kind}/{span.name}"


class HostCopy:
    """The spans that this rank saves, in host memory, as the body of its file.

    It takes as many bytes as the file, from the first save to the end of the run: for weights, one
    average and two moments in float32, 16 bytes a parameter divided by the ranks that share one
    copy of the state. On CUDA it is pinned memory.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: list[Tensor] = []
        self.pieces: Mapping[str, Piece] = {}

    def reserve(self, spans: Iterable[Span]) -> None:
        """Lay out the file and take the memory; the layout is the same at every save."""
        if self._blocks:
            return
        pieces = {
            key_of(span): Piece(
                shape=span.shape,
                dtype=span.local.dtype,
                offset=span.offset,
                length=span.local.numel(),
                begin=0,
            )
            for span in spans
            if span.mine and span.local.numel()
        }
        # Wide types first: so every number is aligned, as the library wants it.
        ordered = sorted(pieces.items(), key=lambda item: -item[1].dtype.itemsize)
        end = 0
        self.pieces = {}
        for key, piece in ordered:
            self.pieces[key] = replace(piece, begin=end)
            end = self.pieces[key].end
        self._blocks = [
            torch.empty(min(BLOCK, end - begin), dtype=torch.uint8, pin_memory=self._pinned)
            for begin in range(0, end, BLOCK)
        ]

    @torch.no_grad()
    def take(self, spans: Iterable[Span]) -> None:
        """Copy the present state; when this returns it may change."""
        for span in spans:
            if span.mine and span.local.numel():
                piece = self.pieces[key_of(span)]
                flat = span.local.detach().view(torch.uint8)
                assert len(flat) == piece.end - piece.begin, "the layout of the state has changed"
                self._put(flat, piece.begin)
        if self._pinned:
            torch.cuda.synchronize()

    def parts(self) -> Iterator[bytes | memoryview]:
        """Yield all of the file's bytes."""
        yield header(self.pieces)
        for block in self._blocks:
            data = block.numpy().data
            yield from (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))

    def _put(self, flat: Tensor, begin: int) -> None:
        """Copy bytes to where they stand in the body, over the borders of blocks."""
        done = 0
        while done < len(flat):
            number, place = divmod(begin + done, BLOCK)
            room = min(BLOCK - place, len(flat) - done)
            part = flat[done : done + room]
            self._blocks[number][place : place + room].copy_(part, non_blocking=self._pinned)
            done += room
