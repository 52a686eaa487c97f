"""Prompts to pictures: a network, its encoders, and settings for one, two or four steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from twinflow_train.batch import Condition, Velocity
from twinflow_train.encoding.pictures import Size, Unusable, load, scaled
from twinflow_train.errors import UserError
from twinflow_train.flow.sampler import Sampler, Style, sample
from twinflow_train.models.base import Model
from twinflow_train.models.codec import Codec, EditCodec, Encoders
from twinflow_train.rng import generator
from twinflow_train.sampling.origin import Origin, find


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came out.

    tensors: pictures in [-1, 1], on the CPU; of each prompt's, one after the other. sampler: how.
    seconds: a picture, in the network alone.
    """

    tensors: Float[Tensor, "b 3 h w"]
    sampler: Sampler
    seconds: float

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, 8 bits a colour."""
        levels = ((self.tensors.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()) for each in levels]


class TwinFlowPipeline:
    """Draws pictures in few steps: `TwinFlowPipeline.from_pretrained(FOLDER)("a red fox")`.

    origin: the weights and what belongs to them. velocity, codec: both loaded.
    """

    def __init__(
        self, *, origin: Origin, velocity: Velocity, codec: Codec, device: torch.device
    ) -> None:
        self.origin, self.velocity, self.codec, self.device = origin, velocity, codec, device

    @staticmethod
    def from_pretrained(
        where: str,
        *,
        encoders: str | None = None,
        model: Model | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> TwinFlowPipeline:
        """Load an export of ours, the released weights, or a base.

        where: a run, an export, a diffusers folder, or a repository of the Hugging Face hub.
        encoders: a diffusers pipeline or repository with the VAE and the text encoder, where
        `where` has none. model: its size, if it is no released one. device: a GPU if there is one.
        dtype: in which the network computes; bfloat16 on a GPU, float32 on a CPU.

        Raises:
            UserError: something is missing, damaged or of another family.
        """
        given = find(where, model=model)
        if encoders is not None:
            kind = type(given.encoders)
            given = find(where, model=model, encoders=kind(path=encoders))
        return TwinFlowPipeline.of(given, device=device, dtype=dtype)

    @staticmethod
    def of(
        origin: Origin,
        *,
        encoders: Encoders | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> TwinFlowPipeline:
        """Load what was found."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        own = torch.bfloat16 if place.type == "cuda" else torch.float32
        chosen = encoders or origin.encoders
        codec = chosen.open(chosen.find(), place)
        velocity = origin.network(device=place, dtype=dtype or own)
        return TwinFlowPipeline(origin=origin, velocity=velocity, codec=codec, device=place)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        style: Style | str | None = None,
        sampler: Sampler | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        pictures: Sequence[Image.Image | Path | str] = (),
        batch: int = 4,
        first: int = 0,
    ) -> Drawn:
        """Draw pictures; each is a function of (seed, its number) and not of `batch`.

        num_inference_steps, style: choose among the published settings; those that travel with the
        weights where both are left out. sampler: all settings, instead of both. height, width: in
        pixels; the size that the model was made for. pictures: to edit, or files of them, with a
        model for editing. batch: pictures in one network call. first: number of the first picture,
        where a larger set is drawn in parts.

        Raises:
            UserError: a size, a style or a prompt that the model cannot take.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.check(texts)
        style = Style[style] if isinstance(style, str) else style
        how = sampler or self.origin.sampler(steps=num_inference_steps, style=style)
        shape = self.shape(height, width)
        references = self._cut(pictures, shape)
        cond = self.embed(texts, references)
        null = self.embed([self.codec.null_prompt], references) if how.guidance != 1 else None
        numbers = range(len(texts) * num_images_per_prompt)
        latents, seconds = [], 0.0
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            rows = torch.tensor([number // num_images_per_prompt for number in part])
            began = self._now()
            named = [first + number for number in part]
            found = self._sample(named, cond[rows.to(self.device)], null, how, shape, seed=seed)
            seconds += self._now() - began
            latents += list(found)
        drawn = torch.cat(list(self._decoded(latents)))
        return Drawn(tensors=drawn, sampler=how, seconds=seconds / len(numbers))

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are empty, or too long for the text encoder: UserError."""
        if not prompts or not all(text.strip() for text in prompts):
            raise UserError("prompts: at least one is wanted, and none may be empty")
        for text in dict.fromkeys(prompts):
            length = self.codec.length(text)
            if length is not None and length.tokens > length.most:
                raise UserError(
                    f"prompts: {text[:40]!r}... has {length.tokens} tokens, and the text encoder "
                    f"reads {length.most}: shorten it"
                )

    def shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return the latent's shape for a size in pixels; UserError if the model cannot draw it."""
        given = [side for side in (height, width) if side is not None]
        usual = given * 2 if given else self._usual()
        tall, wide = (
            one if side is None else side for one, side in zip(usual, (height, width), strict=False)
        )
        for key, value in {"height": tall, "width": wide}.items():
            if value < 1 or value % self.codec.multiple:
                near = max(round(value / self.codec.multiple), 1) * self.codec.multiple
                raise UserError(
                    f"{key} is {value}; it must be a multiple of {self.codec.multiple}, for "
                    f"instance {near}"
                )
        shape = self.codec.latent_shape(tall, wide)
        self.origin.model.check(
            shape,
            self.codec.text_width,
            pooled_width=self.codec.pooled_width,
            references=int(isinstance(self.codec, EditCodec)),
        )
        return shape

    def _usual(self) -> tuple[int, int]:
        """Return height and width in pixels of what the model was trained on."""
        if self.origin.latent is None:
            return self.codec.usual_size, self.codec.usual_size
        return self._pixels(self.origin.latent)

    def _pixels(self, latent: Sequence[int]) -> tuple[int, int]:
        """Return height and width in pixels of the picture of a latent (C, H, W)."""
        unit = self.codec.multiple
        _, tall, wide = self.codec.latent_shape(unit, unit)
        return latent[1] * unit // tall, latent[2] * unit // wide

    def embed(
        self, prompts: Sequence[str], references: Sequence[UInt8[Tensor, "3 h w"]] = ()
    ) -> Condition:
        """Encode prompts, one at a time: what stands beside one changes nothing. Equal ones, once.

        references: the pictures that they are about, for editing.
        """
        if isinstance(self.codec, EditCodec):
            found = self.codec.embed_edits(prompts, references)
        else:
            distinct = list(dict.fromkeys(prompts))
            made = dict(zip(distinct, self.codec.embed(distinct, at_once=1), strict=True))
            found = [made[text] for text in prompts]
        cond = Condition.of([each.to("cpu", torch.float32) for each in found]).to(self.device)
        latents = (self.codec.encode(scaled(one)[None]) for one in references)
        return replace(
            cond, references=tuple(one.expand(len(prompts), -1, -1, -1) for one in latents)
        )

    def _cut(
        self, pictures: Sequence[Image.Image | Path | str], shape: Sequence[int]
    ) -> list[UInt8[Tensor, "3 h w"]]:
        """Read pictures and cut them to the size of a latent; UserError if there may be none."""
        edits = isinstance(self.codec, EditCodec)
        if edits and not pictures:
            raise UserError("pictures: this model edits, and wants one or more pictures to edit")
        if pictures and not edits:
            raise UserError("pictures: this model takes none; they are for models that edit")
        found = []
        for each in pictures:
            try:
                found.append(load(_bytes(each), Size(*self._pixels(shape)))[1])
            except (OSError, Unusable) as error:
                raise UserError(f"pictures: {each} cannot be used ({error})") from error
        return found

    def _sample(
        self,
        numbers: Sequence[int],
        cond: Condition,
        null: Condition | None,
        how: Sampler,
        shape: Sequence[int],
        *,
        seed: int,
    ) -> Float[Tensor, "b c h w"]:
        def draw(*path: object) -> Tensor:
            draws = (generator("sample", seed, number, *path) for number in numbers)
            return torch.stack([torch.randn(*shape, generator=each) for each in draws])

        def eps(step: int) -> Tensor:
            return draw("eps", step).to(self.device)

        start = draw("start").to(self.device)
        return sample(self.velocity, start, cond, how, null=null, eps=eps)

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[Float[Tensor, "1 3 h w"]]:
        for latent in latents:
            yield self.codec.decode(latent[None]).cpu()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _bytes(picture: Image.Image | Path | str) -> bytes:
    """Return a picture's file."""
    if not isinstance(picture, Image.Image):
        return Path(picture).read_bytes()
    written = BytesIO()
    picture.save(written, format="PNG")
    return written.getvalue()
