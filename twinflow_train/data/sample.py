"""One sample: what it holds, what is allowed, and its bytes in a shard."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Condition, Embedding
from twinflow_train.data.manifest import DTYPES, Form, LatentShape
from twinflow_train.data.ranges import Copy
from twinflow_train.errors import UserError

KEY = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
"""Keys become file names: no dot, since WebDataset ends a key there, and no way out of a folder."""
LONGEST_KEY = 80
LONGEST_HEADER = 1_000_000
"""Bytes of a sample's safetensors header."""
FIRST_READ = 2048
"""Bytes that are read to find the header, which is rarely longer."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What safetensors calls them."""
BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
}
"""For each type an integer of its size, the bits of it that are not the sign, and infinity's."""


@dataclass(kw_only=True)
class Sample:
    """One image and its captions; a sample that was read has one caption, the chosen one.

    key: name in the data set; it becomes the names of the tar's members.
    latent: clean latent in the model's normalisation; None: the image is generated in training.
    texts: unpadded token embeddings, one for each caption.
    pooled: pooled text embeddings, one for each caption, for families that want one.
    references: latents of reference images, for editing.
    null: the null prompt's token embedding beside these reference images.
    fields: anything else that JSON can hold, for example `label`, or `size`, in pixels.
    """

    key: str
    latent: Float[Tensor, "*chw"] | None
    texts: Sequence[Float[Tensor, "_ width"]]
    captions: Sequence[str]
    pooled: Sequence[Float[Tensor, " pooled"]] = ()
    references: Sequence[Float[Tensor, "..."]] = ()
    null: Float[Tensor, "_ width"] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.texts or len(self.texts) != len(self.captions):
            raise UserError(
                f"sample {self.key}: {len(self.captions)} captions, {len(self.texts)} embeddings"
            )
        if self.pooled and len(self.pooled) != len(self.captions):
            raise UserError(
                f"sample {self.key}: {len(self.captions)} captions, {len(self.pooled)} pooled"
            )

    @property
    def text(self) -> Float[Tensor, "tokens width"]:
        """Return the first caption's token embedding."""
        return self.texts[0]

    @property
    def caption(self) -> str:
        """Return the first caption."""
        return self.captions[0]

    @property
    def image(self) -> Float[Tensor, "*chw"]:
        """Return the latent; UserError if the set has none."""
        if self.latent is None:
            raise UserError(f"sample {self.key} has no latent: its set is for image-free training")
        return self.latent

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in a shard."""
        found = {} if self.latent is None else {"latent": self.latent}
        several = {"text": self.texts, "pooled": self.pooled, "reference": self.references}
        for kind, each in several.items():
            found |= {f"{kind}.{n}": tensor for n, tensor in enumerate(each)}
        return found if self.null is None else found | {"null.0": self.null}


def condition_of(samples: Sequence[Sample]) -> Condition:
    """Return what samples are conditioned on, each on its first caption, in float32."""
    rows = [
        Embedding(one.text, one.pooled[0] if one.pooled else None).to("cpu", torch.float32)
        for one in samples
    ]
    references = zip(*(one.references for one in samples), strict=True)
    return replace(
        Condition.of(rows), references=tuple(torch.stack(same).float() for same in references)
    )


def form_of(sample: Sample) -> Form:
    """Describe a sample's tensors."""
    return Form(
        latent_dtype="none" if sample.latent is None else name_of(sample.latent.dtype),
        text_width=sample.text.shape[-1],
        text_dtype=name_of(sample.text.dtype),
        pooled_width=len(sample.pooled[0]) if sample.pooled else 0,
        references=len(sample.references),
        own_null=sample.null is not None,
    )


def fault_to_write(sample: Sample, form: Form, latent_shape: LatentShape) -> str:
    """Say what forbids writing a sample; empty if nothing does."""
    if not KEY.fullmatch(sample.key) or len(sample.key) > LONGEST_KEY:
        return f"a key must match {KEY.pattern} and have at most {LONGEST_KEY} characters"
    if "captions" in sample.fields:
        return "`captions` cannot be a free field"
    if (found := form_of(sample)) != form:
        return f"is {found}, the others are {form}"
    if sample.latent is None and sample.references:
        return "has references and no latent"
    for name, tensor in sample.tensors().items():
        if fault := fault_of(name, tensor.dtype, tuple(tensor.shape), form, latent_shape):
            return fault
        if name_of(tensor.dtype) not in DTYPES:
            return f"`{name}` is {name_of(tensor.dtype)}; allowed are {', '.join(DTYPES)}"
        if not bool(tensor.isfinite().all()):
            return f"`{name}` is not finite"
    return ""


def fault_of(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], form: Form, latent_shape: LatentShape
) -> str:
    """Say what makes a sample's tensor unusable by its type and shape; empty if nothing does."""
    kind = name.partition(".")[0]
    wanted = form.latent_dtype if kind in ("latent", "reference") else form.text_dtype
    if kind in ("text", "null"):
        fits, allowed = shape[1:] == (form.text_width,) and shape[0], f"(tokens, {form.text_width})"
    else:
        exact = (form.pooled_width,) if kind == "pooled" else latent_shape
        fits, allowed = shape == exact, str(exact)
    if fits and name_of(dtype) == wanted:
        return ""
    return f"`{name}` is {name_of(dtype)} {shape}, where {wanted} {allowed} is wanted"


def tensors_of(sample: Sample) -> bytes:
    """Write a sample's tensors as safetensors."""
    return safetensors.torch.save({k: t.contiguous() for k, t in sample.tensors().items()})


def fields_of(sample: Sample) -> bytes:
    """Write a sample's captions and free fields as JSON."""
    said = {**sample.fields, "captions": list(sample.captions)}
    return json.dumps(said, sort_keys=True, allow_nan=False).encode()


class Stored(NamedTuple):
    """A tensor in a file: its type and shape, and where its bytes begin and end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


Room = Callable[[str, int], memoryview]
"""Returns where the bytes of a tensor go, by its name and their number."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a sample lie in its safetensors file, and the header that says so."""

    header: bytes
    tensors: Mapping[str, Stored]

    @cached_property
    def runs(self) -> list[tuple[int, list[tuple[str, int]]]]:
        """Where tensors lie side by side: from which byte on, and their names and sizes.

        The first run begins with the header, at 0.
        """
        found: list[tuple[int, list[tuple[str, int]]]] = [(0, [])]
        end = len(self.header)
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].begin):
            if stored.begin != end:
                found.append((stored.begin, []))
            found[-1][1].append((name, stored.end - stored.begin))
            end = stored.end
        return found

    def copy(self, copy: Copy, room: Room) -> bool:
        """Copy the tensors of a file to where there is room; tell whether it has this layout.

        Raises:
            OSError: it cannot be read.
        """
        header = bytearray(len(self.header))
        memories = [memoryview(header)]
        for begin, tensors in self.runs:
            memories += [room(name, size) for name, size in tensors]
            copy(begin, memories)
            memories = []
        return header == self.header


def header_of(copy: Copy, size: int) -> bytes:
    """Read the header of a safetensors file of `size` bytes; ValueError if it is none."""
    first = bytearray(min(FIRST_READ, size))
    copy(0, [memoryview(first)])
    end = header_size(first, size)
    if end > len(first):
        first = bytearray(end)
        copy(0, [memoryview(first)])
    return bytes(first[:end])


def header_size(first: bytes | bytearray, size: int) -> int:
    """Return where the header of a safetensors file of `size` bytes ends, by its first 8 bytes.

    Raises:
        ValueError: it is none.
    """
    end = 8 + int.from_bytes(first[:8], "little")
    if not 8 < end <= min(size, LONGEST_HEADER):
        raise ValueError(f"not safetensors: its header ends at byte {end} of {size}")
    return end


def layout(
    header: bytes, size: int, *, caption: int, form: Form, latent_shape: LatentShape
) -> Layout:
    """Find a sample's tensors in a safetensors file of `size` bytes by its header, from byte 0 on.

    Of texts and pooled embeddings that of one caption is found.

    Raises:
        ValueError: it is not that of a sample of this form.
    """
    try:
        said: dict[str, Any] = json.loads(header[8:])
        wanted = [] if form.latent_dtype == "none" else ["latent"]
        wanted += [f"text.{caption}"]
        wanted += [f"pooled.{caption}"] if form.pooled_width else []
        wanted += [f"reference.{n}" for n in range(form.references)]
        wanted += ["null.0"] if form.own_null else []
        found = {name: _stored(said[name], len(header), size) for name in wanted}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not safetensors of a sample ({error!r})") from error
    for name, stored in found.items():
        if fault := fault_of(name, stored.dtype, stored.shape, form, latent_shape):
            raise ValueError(fault)
    return Layout(header, found)


def _stored(entry: dict[str, Any], start: int, size: int) -> Stored:
    """Read what a header says of a tensor whose offsets count from `start`."""
    numbers = (*entry["data_offsets"], *entry["shape"])
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a tensor of shape {entry['shape']} at {entry['data_offsets']}")
    begin, end = (start + offset for offset in entry["data_offsets"])
    dtype, shape = TYPES[STORED[entry["dtype"]]], tuple(entry["shape"])
    if not start <= begin <= end <= size:
        raise ValueError(f"a tensor ends at byte {end} of {size}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of {end - begin} bytes is said to be {dtype} {shape}")
    return Stored(dtype, shape, begin, end)


def parse(
    key: str,
    tensors: bytearray,
    fields: bytes | bytearray,
    *,
    caption: int,
    form: Form,
    latent_shape: LatentShape,
) -> Sample:
    """Read a sample with caption number `caption` modulo its captions, its tensors as views.

    Raises:
        ValueError: the bytes are not those of a sample of this form.
    """
    captions, said = captions_of(fields)
    number = caption % len(captions)
    header = bytes(tensors[: header_size(tensors, len(tensors))])
    found = layout(header, len(tensors), caption=number, form=form, latent_shape=latent_shape)
    views = {name: _view(tensors, stored) for name, stored in found.tensors.items()}
    for name, view in views.items():
        if looked_at(name) and not_finite(view[None])[0]:
            raise ValueError(f"`{name}` is not finite")
    return Sample(
        key=key,
        latent=views.get("latent"),
        texts=(views[f"text.{number}"],),
        captions=(captions[number],),
        pooled=(views[f"pooled.{number}"],) if form.pooled_width else (),
        references=tuple(views[f"reference.{n}"] for n in range(form.references)),
        null=views.get("null.0"),
        fields=said,
    )


def captions_of(fields: bytes | bytearray) -> tuple[list[str], dict[str, Any]]:
    """Read a sample's captions and free fields; ValueError if there is no caption."""
    try:
        said: dict[str, Any] = json.loads(fields)
        captions: list[str] = said.pop("captions")
        if not isinstance(captions, list) or not captions:
            raise TypeError(f"{captions!r:.40}")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its JSON lacks captions ({error!r})") from error
    return captions, said


def _view(data: bytearray, stored: Stored) -> Tensor:
    count = math.prod(stored.shape)
    flat = torch.frombuffer(data, dtype=stored.dtype, offset=stored.begin, count=count)
    return flat.view(stored.shape)


def not_finite(rows: Tensor) -> npt.NDArray[np.bool_]:
    """Tell of each row whether one of its numbers is none, by their bits: torch is far slower."""
    integer, magnitude, infinity = BITS[rows.dtype]
    bits = rows.view(integer).numpy().reshape(len(rows), -1)
    found: npt.NDArray[np.bool_] = (bits & magnitude).max(axis=1) >= infinity
    return found


def looked_at(name: str) -> bool:
    """Tell whether a tensor is looked at for what is no number: texts, far larger, when written."""
    return not name.startswith(("text", "null"))


def name_of(dtype: torch.dtype) -> str:
    """Name a type as manifests do."""
    return str(dtype).removeprefix("torch.")


def member_fault(name: str, *, regular: bool) -> str:
    """Say what no member of a shard may be; empty if it may."""
    if unsafe(name) or not regular:
        return f"member {name!r} is not a plain file inside the tar"
    if PurePosixPath(name).suffix not in (".safetensors", ".json"):
        return f"member {name!r}: only .safetensors and .json are read"
    return ""


def unsafe(name: str) -> bool:
    """Tell whether a member's name could leave the folder that a tar is unpacked in."""
    return "\\" in name or any(part in ("", ".", "..") for part in name.split("/"))
