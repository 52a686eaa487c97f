"""One sample: what it holds, what is allowed, and its bytes in a shard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.data.manifest import Form, LatentShape
from twinflow_train.errors import UserError

KEY = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
"""Keys become file names: no dot, since WebDataset ends a key there, and no way out of a folder."""
LONGEST_KEY = 80
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in safetensors: the types that latents and embeddings may have."""


@dataclass(kw_only=True)
class Sample:
    """One image and its captions; a sample that was read has one caption, the chosen one.

    key: name in the data set; it becomes the names of the tar's members.
    latent: clean latent in the model's normalisation; None: the image is generated in training.
    texts: unpadded token embeddings, one for each caption.
    pooled: pooled text embeddings, one for each caption, for families that want one.
    references: latents of reference images, for editing.
    fields: anything else that JSON can hold, for example `label`, or `size`, in pixels.
    """

    key: str
    latent: Float[Tensor, "*chw"] | None
    texts: Sequence[Float[Tensor, "_ width"]]
    captions: Sequence[str]
    pooled: Sequence[Float[Tensor, " pooled"]] = ()
    references: Sequence[Float[Tensor, "..."]] = ()
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


def form_of(sample: Sample) -> Form:
    """Describe a sample's tensors."""
    latents = [tensor for tensor in (sample.latent, *sample.references) if tensor is not None]
    return Form(
        latent_dtype=_name(latents[0]) if latents else "none",
        text_width=sample.text.shape[-1],
        text_dtype=_name(sample.text),
        pooled_width=len(sample.pooled[0]) if sample.pooled else 0,
        references=len(sample.references),
    )


def fault_to_write(sample: Sample, form: Form, latent_shape: LatentShape) -> str:
    """Say what forbids writing a sample; empty if nothing does."""
    if not KEY.fullmatch(sample.key) or len(sample.key) > LONGEST_KEY:
        return f"a key must match {KEY.pattern} and have at most {LONGEST_KEY} characters"
    if "captions" in sample.fields:
        return "`captions` cannot be a free field"
    for text in sample.texts:
        if fault := text_fault(text, form):
            return fault
    if (found := form_of(sample)) != form:
        return f"is {found}, the others are {form}"
    named = [("latent", sample.latent), *(("reference", r) for r in sample.references)]
    for name, tensor in named:
        if tensor is not None and not bool(tensor.isfinite().all()):
            return f"the {name} is not finite"
    if not all(bool(t.isfinite().all()) for t in (*sample.texts, *sample.pooled)):
        return "a text embedding is not finite"
    if sample.latent is not None and tuple(sample.latent.shape) != latent_shape:
        return f"the latent has shape {tuple(sample.latent.shape)}, the shard's have {latent_shape}"
    return ""


def text_fault(text: Tensor, form: Form) -> str:
    """Say what makes a text embedding unusable; empty if nothing does."""
    if text.ndim != 2 or len(text) == 0:
        return f"a text embedding has shape {tuple(text.shape)}, not (tokens, width)"
    if (text.shape[1], _name(text)) != (form.text_width, form.text_dtype):
        return f"a text embedding is {_name(text)} {tuple(text.shape)}, the others are {form}"
    return ""


def tensors_of(sample: Sample) -> bytes:
    """Write a sample's tensors as safetensors."""
    tensors = {f"text.{n}": text.contiguous() for n, text in enumerate(sample.texts)}
    tensors |= {f"pooled.{n}": pooled.contiguous() for n, pooled in enumerate(sample.pooled)}
    tensors |= {f"reference.{n}": r.contiguous() for n, r in enumerate(sample.references)}
    if sample.latent is not None:
        tensors["latent"] = sample.latent.contiguous()
    return safetensors.torch.save(tensors)


def fields_of(sample: Sample) -> bytes:
    """Write a sample's captions and free fields as JSON."""
    said = {**sample.fields, "captions": list(sample.captions)}
    return json.dumps(said, sort_keys=True, allow_nan=False).encode()


def parse(
    key: str,
    tensors: bytearray | memoryview,
    fields: bytes | memoryview,
    *,
    caption: int,
    form: Form,
    latent_shape: LatentShape,
) -> Sample:
    """Read a sample with caption number `caption` modulo its captions, its tensors as views.

    Raises:
        ValueError: the bytes are not those of a sample of this form.
    """
    views = _views(tensors)
    try:
        said: dict[str, Any] = json.loads(bytes(fields))
        captions: list[str] = said.pop("captions")
        chosen = caption % len(captions)
        sample = Sample(
            key=key,
            latent=views.get("latent"),
            texts=(views[f"text.{chosen}"],),
            captions=(captions[chosen],),
            pooled=(views[f"pooled.{chosen}"],) if form.pooled_width else (),
            references=tuple(views[f"reference.{n}"] for n in range(form.references)),
            fields=said,
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{error!r}") from error
    if fault := _fault(sample, form, latent_shape):
        raise ValueError(fault)
    return sample


def _fault(sample: Sample, form: Form, latent_shape: LatentShape) -> str:
    """Say what makes a sample that was read unusable; empty if nothing does.

    Latents are looked at for numbers that are none; texts, many times as large, when written.
    """
    if fault := text_fault(sample.text, form):
        return fault
    if (found := form_of(sample)) != form:
        return f"is {found}, the others are {form}"
    if sample.latent is None:
        return ""
    if tuple(sample.latent.shape) != latent_shape:
        return f"the latent has shape {tuple(sample.latent.shape)}, the shard's have {latent_shape}"
    return "" if bool(sample.latent.isfinite().all()) else "the latent is not finite"


def _views(data: bytearray | memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in memory, without copying; `data` is writable."""
    size = int.from_bytes(data[:8], "little")
    try:
        header: dict[str, Any] = json.loads(bytes(data[8 : 8 + size]))
        header.pop("__metadata__", None)
        return {
            name: _view(data, 8 + size, entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
        }
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not safetensors ({error!r})") from error


def _view(
    data: bytearray | memoryview, start: int, dtype: str, shape: list[int], ends: list[int]
) -> Tensor:
    begin, end = ends
    kind = DTYPES[dtype]
    if not 0 <= begin <= end <= len(data) - start:
        raise ValueError(f"a tensor ends at byte {end} of {len(data) - start}")
    if begin == end:
        return torch.empty(shape, dtype=kind)
    flat = torch.frombuffer(data, dtype=torch.uint8, offset=start + begin, count=end - begin)
    return flat.view(kind).view(shape)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
