"""The toy networks of the recorded runs: forward(x_t, t, tt, c) with c[0] of shape (b, 3).

Times are flat, of length b or 1.  The recorded weights belong into them; `seed` only serves tests
that want some other network.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def _init(module: nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(module.named_parameters()):
        values = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        p.data.copy_(values * scale)


def _rows(t: Tensor, like: Tensor) -> Tensor:
    t = t.to(like.dtype).flatten()
    return t.expand(len(like)) if t.numel() == 1 else t


class ConvNet(nn.Module):
    """Two convolutions around a per-pixel layer, with both times and the condition added."""

    def __init__(
        self,
        ch: int = 2,
        hid: int = 6,
        cdim: int = 3,
        seed: int = 0,
        scale: float = 0.35,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.inp = nn.Conv2d(ch, hid, 3, padding=1)
        self.temb = nn.Linear(6 + cdim, hid)
        self.mix = nn.Linear(hid, hid)
        self.out = nn.Conv2d(hid, ch, 3, padding=1)
        _init(self, seed, scale)
        self.to(dtype)

    def hidden(self, h: Tensor) -> Tensor:
        return self.mix(h)

    def forward(
        self, x_t: Tensor, t: Tensor, tt: Tensor | None = None, c: Sequence[Tensor] = ()
    ) -> Tensor:
        t = _rows(t, x_t)
        tt = torch.zeros_like(t) if tt is None else _rows(tt, x_t)
        cond = c[0].to(x_t.dtype).reshape(len(x_t), -1)
        cond = torch.cat([cond, cond.new_zeros(len(x_t), 3 - cond.shape[1])], 1)
        waves = [t, tt, torch.sin(3 * t), torch.cos(3 * t), torch.sin(2 * tt), torch.cos(2 * tt)]
        embedding = self.temb(torch.cat([torch.stack(waves, 1), cond], 1))
        h = torch.tanh(self.inp(x_t) + embedding[:, :, None, None])
        h = torch.tanh(self.hidden(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.out(h)


class _Adapter(nn.Module):
    def __init__(self, hid: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Linear(hid, rank, bias=False)
        self.B = nn.Linear(rank, hid, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.B(self.A(h))


class LoraNet(ConvNet):
    """ConvNet with the low-rank adapters `default` (trained) and `old` (averaged) on its layer."""

    def __init__(
        self,
        ch: int = 2,
        hid: int = 6,
        cdim: int = 3,
        rank: int = 2,
        seed: int = 0,
        scale: float = 0.35,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(ch, hid, cdim, seed, scale)
        self.lora = nn.ModuleDict({"default": _Adapter(hid, rank), "old": _Adapter(hid, rank)})
        for offset, adapter in enumerate(self.lora.values()):
            _init(adapter, seed + 100 * (offset + 1), 0.5)
        self.active: str | None = "default"
        self.to(dtype)
        for name, p in self.named_parameters():
            p.requires_grad_("lora.default" in name)

    def hidden(self, h: Tensor) -> Tensor:
        return self.mix(h) if self.active is None else self.mix(h) + self.lora[self.active](h)

    def set_adapter(self, name: str) -> None:
        self.active = name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        before, self.active = self.active, None
        try:
            yield
        finally:
            self.active = before
