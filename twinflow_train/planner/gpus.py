"""GPUs: how fast they multiply, what they hold, and how fast they talk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A kind of GPU, by its maker's figures.

    flops: bfloat16 operations a second by its matrix units, without sparsity. memory: bytes that a
    program sees. link: bytes a second to the others of its node, network: to those of other nodes,
    one way.
    """

    flops: float
    memory: float
    link: float
    network: float = 50e9


GIB = 2**30

GPUS = {
    "a100_40gb": GPU(flops=312e12, memory=39.4 * GIB, link=300e9, network=25e9),
    "a100_80gb": GPU(flops=312e12, memory=79.2 * GIB, link=300e9, network=25e9),
    "l40s_48gb": GPU(flops=362e12, memory=44.4 * GIB, link=32e9, network=25e9),
    "rtx4090_24gb": GPU(flops=165e12, memory=23.5 * GIB, link=32e9, network=12e9),
    "h100_pcie_80gb": GPU(flops=756e12, memory=79.1 * GIB, link=64e9),
    "h100_80gb": GPU(flops=989e12, memory=79.1 * GIB, link=450e9),
    "h200_141gb": GPU(flops=989e12, memory=139.8 * GIB, link=450e9),
    "b200_180gb": GPU(flops=2250e12, memory=178.0 * GIB, link=900e9),
}
"""Kinds by the names of the option `gpu`."""

Kind = Enum("Kind", {name: name for name in GPUS})  # type: ignore[misc]  # read from the table
Kind.__doc__ = "A kind of GPU."

_NAMES = (
    ("H100 PCIe", "h100_pcie_80gb"),
    ("H100", "h100_80gb"),
    ("H200", "h200_141gb"),
    ("B200", "b200_180gb"),
    ("A100", "a100_80gb"),
    ("L40S", "l40s_48gb"),
    ("RTX 4090", "rtx4090_24gb"),
)
"""What the driver's names contain, the longer before the shorter."""


def named(device: str) -> GPU | None:
    """Find a GPU by the name that its driver gives; None if its figures are not known here."""
    for part, kind in _NAMES:
        if part in device:
            return GPUS[kind]
    return None
