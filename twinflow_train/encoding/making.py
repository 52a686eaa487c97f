"""Making one shard: items are read and encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from twinflow_train.batch import Embedding
from twinflow_train.data.manifest import Form
from twinflow_train.data.sample import Sample
from twinflow_train.encoding.images import Latents, Ready
from twinflow_train.encoding.pictures import Unusable, scaled
from twinflow_train.encoding.plan import Skipped, Task, ahead
from twinflow_train.encoding.records import Made
from twinflow_train.encoding.settings import Preparation
from twinflow_train.encoding.sources import Item, Reader
from twinflow_train.engines.base import Precision
from twinflow_train.models.codec import Codec, EditCodec


@dataclass(kw_only=True)
class Maker:
    """Makes shards with what is loaded. done: is told of every item that was read."""

    settings: Preparation
    reader: Reader
    codec: Codec
    latents: Latents
    pool: ThreadPoolExecutor
    done: Callable[[int], object]

    def make(self, task: Task) -> Made:
        """Read and encode a task's items."""
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        read = self._read(task, skipped)
        while batch := list(islice(read, self.settings.batch)):
            for ready, sample in zip(batch, self._encoded(batch), strict=True):
                if _finite(sample):
                    samples.append(sample)
                else:
                    skipped.append(_skip(ready.item, "its encoding is not finite"))
        return Made(
            task=task,
            form=form(self.settings, self.codec),
            latent_shape=self.codec.latent_shape(*task.size),
            samples=samples,
            skipped=skipped,
        )

    def _read(self, task: Task, skipped: list[Skipped]) -> Iterator[Ready]:
        """Yield the items that can be used, and put the others into `skipped`."""
        images = self.settings.images

        def ready(item: Item) -> Ready | Skipped:
            try:
                return images.ready(item, self.reader.read(item.where), task.size)
            except Unusable as reason:
                return _skip(item, str(reason))

        depth = self.settings.loaders + self.settings.batch
        for _, found in ahead(self.pool, ready, task.items, depth):
            self.done(1)
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                yield found

    def _encoded(self, batch: Sequence[Ready]) -> Iterator[Sample]:
        """Encode items of one size."""
        embedded = list(self._embedded(batch))
        latents = self.latents(batch, [of_item[0] for of_item in embedded])
        references = self._references(batch)
        stored = self.settings.texts.dtype
        for row, (each, own, latent) in enumerate(zip(batch, embedded, latents, strict=True)):
            found = [embedding.to("cpu", stored) for embedding in own]
            texts, nulls = found[: len(each.captions)], found[len(each.captions) :]
            original = {} if each.original is None else {"original_size": list(each.original)}
            yield Sample(
                key=key_of(each.item.number),
                latent=None if latent is None else latent.to("cpu", self.settings.latents.dtype),
                texts=[text.tokens for text in texts],
                pooled=[text.pooled for text in texts if text.pooled is not None],
                references=[slot[row] for slot in references],
                null=nulls[0].tokens if nulls else None,
                captions=each.captions,
                fields={"source": each.item.name, "size": list(each.size), **original},
            )

    def _embedded(self, batch: Sequence[Ready]) -> Iterator[list[Embedding]]:
        """Embed each item's captions and, where it depends on the item, also the null prompt."""
        codec = self.codec
        if isinstance(codec, EditCodec):
            for each in batch:
                yield codec.embed_edits([*each.captions, codec.null_prompt], each.references)
            return
        captions = [caption for each in batch for caption in each.captions]
        found = iter(codec.embed(captions, at_once=self.settings.batch))
        for each in batch:
            yield list(islice(found, len(each.captions)))

    def _references(self, batch: Sequence[Ready]) -> list[Float[Tensor, "b c h w"]]:
        """Encode the items' first reference images, their second ones, and so on."""
        return [
            self.codec.encode(scaled(torch.stack(slot))).to("cpu", self.settings.latents.dtype)
            for slot in zip(*(each.references for each in batch), strict=True)
        ]


def key_of(number: int) -> str:
    """Name an item's sample."""
    return f"{number:09d}"


def form(settings: Preparation, codec: Codec) -> Form:
    """Say what all samples of a set have in common."""
    return Form(
        latent_dtype=_name(settings.latents) if settings.images.latents else "none",
        text_width=codec.text_width,
        text_dtype=_name(settings.texts),
        pooled_width=codec.pooled_width,
        references=settings.source.references,
        own_null=settings.encoders.edits,
    )


def _name(precision: Precision) -> str:
    return str(precision.dtype).removeprefix("torch.")


def _finite(sample: Sample) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in sample.tensors().values())


def _skip(item: Item, reason: str) -> Skipped:
    return Skipped(number=item.number, name=item.name, reason=reason)
