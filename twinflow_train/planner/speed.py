"""How fast a run is, in samples and in operations, from what each step was asked to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from twinflow_train.batch import Batch, Condition
from twinflow_train.draws import Draws
from twinflow_train.planner.flops import Work


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Counts the operations of one rank's steps; everything it looks at is on the CPU.

    work: of the network. order: jumps of the recursion. patch: latents along a token's side.
    recompute: every so-many-th block is recomputed, 0 is none. flops: the most that the device can
    do in a second, None if that is not known. ranks: of the job, alike but for rounding.
    """

    work: Work
    order: int
    patch: int
    recompute: int
    flops: float | None
    ranks: int
    _known: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def speed(
        self, batches: Sequence[Batch], draws: Sequence[Draws], seconds: float
    ) -> dict[str, float]:
        """Give the metrics of one optimizer step; padding is no work."""
        wanted, again, tokens = 0.0, 0.0, 0
        for batch, drawn in zip(batches, draws, strict=True):
            image, texts = self._image(batch), lengths(batch.cond)
            nulls = lengths(batch.null)
            wanted += self._wanted(image, texts, nulls, drawn)
            again += sum(self._of("recomputed", image, length) for length in texts)
            tokens += image * len(texts) + sum(texts)
        samples = sum(len(batch) for batch in batches)
        found = {
            "speed/samples": self.ranks * samples / seconds,
            "speed/tokens": self.ranks * tokens / seconds,
            "speed/tflops": wanted / seconds / 1e12,
        }
        if self.flops:
            found["speed/mfu"] = wanted / seconds / self.flops
            found["speed/hfu"] = (wanted + again) / seconds / self.flops
        return found

    def _image(self, batch: Batch) -> int:
        pictures = (batch.data, *batch.cond.references)
        return sum(math.prod(p.shape[-2:]) for p in pictures) // self.patch**2

    def _wanted(self, image: int, texts: list[int], nulls: list[int], drawn: Draws) -> float:
        """Count all passes of a micro-step as the objective needs them, each once."""
        nulled = drawn.unconditional.tolist()
        own = [nulls[i % len(nulls)] if nulled[i] else length for i, length in enumerate(texts)]

        def passed(rows: Tensor, lengths: Sequence[int]) -> float:
            some = (lengths[i % len(lengths)] for i in rows.tolist())
            return sum(self._of("passed", image, length) for length in some)

        return (
            sum(self._of("learned", image, length) for length in own)
            + passed(drawn.generate, own)
            + passed(drawn.guide, own)
            + passed(drawn.guide, nulls)
            + self.order * passed(drawn.recurse, own)
            + 2 * passed(drawn.rectify, own)
        )

    def _of(self, what: str, image: int, text: int) -> float:
        """Look up what one row costs: lengths repeat, and this runs beside every step."""
        key = what, image, text
        if key not in self._known:
            work, every = self.work, self.recompute
            self._known[key] = {
                "passed": lambda: work.passed(image, text),
                "learned": lambda: work.learned(image, text),
                "recomputed": lambda: work.recomputed(image, text, every=every),
            }[what]()
        return self._known[key]


def lengths(texts: Condition) -> list[int]:
    """Give how many tokens each text has, without padding."""
    if texts.mask is None:
        return [texts.tokens.shape[1]] * len(texts)
    found: list[int] = texts.mask.sum(1).tolist()
    return found
