"""What travels between the layers: a batch, its condition, and what a velocity is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Times = Float[Tensor, " b"]
Rows = slice | Tensor
"""Selects rows of a batch: a slice, or a vector of row indices."""


@dataclass(frozen=True)
class Embedding:
    """What a text encoder makes of one prompt.

    tokens: their embeddings, without padding. pooled: of the whole, for families that want one.
    """

    tokens: Float[Tensor, "tokens width"]
    pooled: Float[Tensor, " pooled"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of a token and of the pooled embedding, 0 where there is none."""
        return self.tokens.shape[-1], 0 if self.pooled is None else len(self.pooled)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Embedding:
        """Move and cast both."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Embedding(self.tokens.to(device, dtype), pooled)


@dataclass(kw_only=True)
class Condition:
    """What an image is conditioned on, one row a sample.

    tokens: text embeddings, padded at the end to the longest row.
    mask: True where a token is real; None when no row is padded.
    pooled: pooled text embedding, for families that want one.
    references: latents of reference images, for editing.
    """

    tokens: Float[Tensor, "b tokens width"]
    mask: Bool[Tensor, "b tokens"] | None = None
    pooled: Float[Tensor, "b pooled"] | None = None
    references: tuple[Float[Tensor, "b ..."], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Rows) -> Condition:
        """Select rows; the padding stays."""
        return Condition(
            tokens=self.tokens[rows],
            mask=None if self.mask is None else self.mask[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
            references=tuple(r[rows] for r in self.references),
        )

    def expand(self, rows: int) -> Condition:
        """Repeat a condition of one row `rows` times without copying it."""
        return Condition(
            tokens=self.tokens.expand(rows, -1, -1),
            mask=None if self.mask is None else self.mask.expand(rows, -1),
            pooled=None if self.pooled is None else self.pooled.expand(rows, -1),
            references=tuple(r.expand(rows, *r.shape[1:]) for r in self.references),
        )

    def to(self, device: torch.device | str) -> Condition:
        """Move every tensor to `device`, asynchronously where memory is pinned."""
        return Condition(
            tokens=self.tokens.to(device, non_blocking=True),
            mask=None if self.mask is None else self.mask.to(device, non_blocking=True),
            pooled=None if self.pooled is None else self.pooled.to(device, non_blocking=True),
            references=tuple(r.to(device, non_blocking=True) for r in self.references),
        )

    @staticmethod
    def pad(rows: Sequence[Tensor]) -> Condition:
        """Stack unpadded token embeddings, each (tokens, width), padding to the longest."""
        longest = max(len(row) for row in rows)
        tokens = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = True
        return Condition(tokens=tokens, mask=None if bool(mask.all()) else mask)

    @staticmethod
    def of(rows: Sequence[Embedding]) -> Condition:
        """Stack embeddings, padding the tokens to the longest."""
        found = Condition.pad([row.tokens for row in rows])
        if rows[0].pooled is None:
            return found
        return replace(found, pooled=torch.stack([_some(row.pooled) for row in rows]))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate along rows, padding the tokens to the longest part."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.tokens.shape[1] for part in parts)
        parts = [part.padded(longest) for part in parts]
        masked = any(part.mask is not None for part in parts)
        first = parts[0]
        return Condition(
            tokens=torch.cat([part.tokens for part in parts]),
            mask=torch.cat([part.full_mask() for part in parts]) if masked else None,
            pooled=None if first.pooled is None else torch.cat([_some(p.pooled) for p in parts]),
            references=tuple(
                torch.cat(same) for same in zip(*(p.references for p in parts), strict=True)
            ),
        )

    def padded(self, tokens: int) -> Condition:
        """Pad at the end to `tokens` tokens."""
        missing = tokens - self.tokens.shape[1]
        if missing == 0:
            return self
        pad = torch.nn.functional.pad
        return replace(
            self,
            tokens=pad(self.tokens, (0, 0, 0, missing)),
            mask=pad(self.full_mask(), (0, missing)),
        )

    def full_mask(self) -> Bool[Tensor, "b tokens"]:
        """Return the mask, all True where none is stored."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "either every row has a pooled embedding or none has"
    return tensor


@dataclass(kw_only=True)
class Batch:
    """Rows of one optimizer step's global batch.

    data: clean latents in the model's normalisation.
    cond: what each row is conditioned on; null: the neutral prompt, one row for all or one each.
    keys: each row's name in the data set, for messages. skipped: rows that stand in for samples
    that could not be used.
    """

    data: Float[Tensor, "b *chw"]
    cond: Condition
    null: Condition
    keys: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.data)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor."""
        yield self.data
        for condition in (self.cond, self.null):
            some = (condition.tokens, condition.mask, condition.pooled, *condition.references)
            yield from (tensor for tensor in some if tensor is not None)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`, asynchronously where memory is pinned."""
        return replace(
            self,
            data=self.data.to(device, non_blocking=True),
            cond=self.cond.to(device),
            null=self.null.to(device),
        )


def moved(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on `device`; a GPU fetches each while it computes with the one before."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    beside, ready = torch.cuda.Stream(device), [*batches]

    def send() -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(beside):
            return ready.pop(0).to(device), beside.record_event()

    sent = send()
    while True:
        batch, event = sent
        if ready:
            sent = send()
        now = torch.cuda.current_stream(device)
        now.wait_event(event)
        for tensor in batch.tensors():
            tensor.record_stream(now)  # or its memory would be given away while in use
        yield batch
        if sent[0] is batch:
            return


@runtime_checkable
class Velocity(Protocol):
    """F(x_t, t, r, cond): predicted average velocity dx/dt from time t to time r, shaped like x_t.

    t and r are float32 (float64 with float64 data) in [-1, 1]; |t| = 1 is noise and 0 is data;
    t > 0 is the real trajectory, t < 0 the fake one; r = t asks for the instantaneous velocity.
    """

    def __call__(
        self, x_t: Float[Tensor, "b *chw"], t: Times, r: Times, cond: Condition, /
    ) -> Float[Tensor, "b *chw"]:
        """Predict the velocity."""
        ...
