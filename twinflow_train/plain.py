"""Settings as plain values, for files."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """Turn dataclasses into mappings with their class as `_type`, and enums into names."""
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        named = {f.name: plain(vars(value)[f.name]) for f in fields(value)}
        return {"_type": type(value).__name__, **named}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
