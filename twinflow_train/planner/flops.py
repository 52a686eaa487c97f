"""Floating-point operations of a network's passes, as formulas in the lengths of its streams.

One pass of the stock network over tensors without numbers says which products there are. Each is
a coefficient times the lengths of what it runs over, so that one pass serves all resolutions and
texts. Only matrix products, attention and convolutions count, two operations a multiplication and
addition, as is usual when a GPU's use is measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from twinflow_train.batch import Condition
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.sd3 import SD3
from twinflow_train.models.z_image import ZImage

IMAGE, TEXT = (3, 5), 150
"""Tokens of the pass that is read, in numbers that are told from other sizes."""
MULTIPLE = 32
"""Z-Image pads each stream to a multiple of so many tokens, which are not counted as work."""

STREAMS = ("image", "text", "joint", "sample")
"""What a product runs over: image tokens, text tokens, both, or once a sample (modulations)."""


@dataclass(frozen=True)
class Kind:
    """What the operations of a product grow with: one stream's length, or two for attention."""

    over: str
    against: str = ""

    def size(self, lengths: Mapping[str, float]) -> float:
        """Return the product of the lengths."""
        return lengths[self.over] * (lengths[self.against] if self.against else 1)

    @property
    def label(self) -> str:
        """The stream by which it is reported."""
        return "attention" if self.against else self.over


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of one row, by kind of product, per unit of length.

    forward, backward: of a pass, and of its gradient. again: what the gradient computes a second
    time if every block is recomputed, by block.
    """

    forward: Mapping[Kind, float]
    backward: Mapping[Kind, float]
    again: Sequence[Mapping[Kind, float]]

    def by_stream(self, image: float, text: float, *, gradient: bool) -> dict[str, float]:
        """Give the operations of a row with and without its gradient, by stream."""
        found: dict[str, float] = dict.fromkeys((*STREAMS, "attention"), 0.0)
        for counts in (self.forward, self.backward) if gradient else (self.forward,):
            for kind, each in counts.items():
                found[kind.label] += each * kind.size(_lengths(image, text))
        return {stream: value for stream, value in found.items() if value}

    def passed(self, image: float, text: float) -> float:
        """Give the operations of a row's pass without gradient."""
        return sum(self.by_stream(image, text, gradient=False).values())

    def learned(self, image: float, text: float) -> float:
        """Give the operations of a row's pass and its gradient, nothing computed twice."""
        return sum(self.by_stream(image, text, gradient=True).values())

    def step(self, rows: Mapping[str, int], image: float, text: float) -> dict[str, float]:
        """Give the operations of an optimizer step by pass: rows of each, `student` with gradient.

        Nothing computed twice is counted twice; all rows are taken to be equally long.
        """
        once = self.passed(image, text)
        found = {name: n * once for name, n in rows.items()}
        return found | {"student": rows["student"] * self.learned(image, text)}

    def recomputed(self, image: float, text: float, *, every: int) -> float:
        """Give what a row's gradient computes again if every so-many-th block is recomputed."""
        if not every:
            return 0.0
        lengths = _lengths(image, text)
        blocks = self.again[::every]
        return sum(each * kind.size(lengths) for b in blocks for kind, each in b.items())


def _lengths(image: float, text: float) -> dict[str, float]:
    return {"image": image, "text": text, "joint": image + text, "sample": 1.0}


class Products(TorchFunctionMode):
    """Records every product that is asked for while it is active."""

    def __init__(self, blocks: Sequence[nn.Module], lengths: Mapping[int, str]) -> None:
        super().__init__()
        self._lengths, self._block = lengths, -1
        self.forward: dict[Kind, float] = defaultdict(float)
        self.backward: dict[Kind, float] = defaultdict(float)
        self.again: list[dict[Kind, float]] = [defaultdict(float) for _ in blocks]
        self._hooks = [block.register_forward_hook(self._leave) for block in blocks]
        for number, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(self._enter(number)))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._block = number

        return enter

    def _leave(self, *_: Any) -> None:
        self._block = -1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run a function, and record it if it is a product."""
        out = func(*args, **(kwargs or {}))
        rule = _RULES.get(func)
        if rule is not None:
            kinds, operands = rule(self._stream, out, *args, **(kwargs or {}))
            self._record(out, kinds, sum(x.requires_grad for x in operands) / len(operands))
        return out

    def _stream(self, size: int) -> str:
        return self._lengths.get(size, "sample")

    def _record(self, out: Tensor, kinds: Mapping[Kind, float], wanted: float) -> None:
        """Count a product, and its gradient once one comes: dead ends never get one."""
        for kind, each in kinds.items():
            self.forward[kind] += each
            if self._block >= 0:
                self.again[self._block][kind] += each
        if out.requires_grad:

            def arrive(_: Tensor) -> None:
                for kind, each in kinds.items():
                    self.backward[kind] += 2 * wanted * each

            out.register_hook(arrive)


Stream = Callable[[int], str]
Rule = tuple[dict[Kind, float], list[Tensor]]


def _linear(stream: Stream, _: Tensor, x: Tensor, weight: Tensor, *__: Any, **___: Any) -> Rule:
    rows = math.prod(x.shape[:-1])
    return _rows(stream, rows, 2 * weight.numel()), [x, weight]


def _convolution(
    stream: Stream, out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any
) -> Rule:
    return _rows(stream, math.prod(out.shape[-2:]), 2 * weight.numel()), [x, weight]


def _attention(
    stream: Stream, _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> Rule:
    width = math.prod(query.shape[:-2]) * (query.shape[-1] + value.shape[-1])
    return {Kind(stream(query.shape[-2]), stream(key.shape[-2])): 2 * width}, [query, key, value]


def _product(stream: Stream, out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> Rule:
    """Count linear attention's products, in which one of the three sizes is a stream's length."""
    sizes = [*out.shape[-2:], a.shape[-1]]
    (length,) = [size for size in sizes if stream(size) != "sample"]
    sizes.remove(length)
    return {Kind(stream(length)): 2 * math.prod(out.shape[:-2]) * math.prod(sizes)}, [a, b]


def _rows(stream: Stream, rows: int, each: float) -> dict[Kind, float]:
    over = stream(rows)
    return {Kind(over): each * (rows if over == "sample" else 1)}


_RULES: dict[Any, Callable[..., Rule]] = {
    F.linear: _linear,
    F.conv2d: _convolution,
    torch.conv2d: _convolution,
    F.scaled_dot_product_attention: _attention,
    torch.matmul: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
}


def work(model: Model, net: VelocityNet) -> Work:
    """Read what a pass of a network does from one pass over tensors without numbers.

    net: of that model, on meta, as it is trained; nothing of it is changed.
    """
    image, text = math.prod(IMAGE), TEXT
    lengths = {image: "image", text: "text", image + text: "joint"}
    if isinstance(model, ZImage):
        padded = [-(-length // MULTIPLE) * MULTIPLE for length in (image, text)]
        lengths |= {padded[0]: "image", padded[1]: "text", sum(padded): "joint"}
    counted = Products([*net.blocks], lengths)
    with torch.enable_grad(), counted:
        out = net(*inputs(model, 1, tuple(side * model.patch for side in IMAGE), text))
        out.float().sum().backward()
    for parameter in net.parameters():
        parameter.grad = None
    return Work(forward=counted.forward, backward=counted.backward, again=counted.again)


def inputs(
    model: Model, rows: int, latent: tuple[int, ...], text: int
) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Give what a network is asked with, without numbers: latents, two times, and texts."""
    x = torch.empty(rows, model.channels, *latent, device="meta")
    times = torch.empty(rows, device="meta")
    tokens = torch.empty(rows, text, model.text_width, device="meta")
    pooled = None
    if isinstance(model, SD3):
        pooled = torch.empty(rows, model.pooled_width, device="meta")
    return x, times, times, Condition(tokens=tokens, pooled=pooled)
