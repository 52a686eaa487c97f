"""Keeps credentials out of what is written down."""

import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(
    r"(?i)(:/{1,2})[^/?#\s]+@"
    r"|([?&][^=\s&]*(?:key|token|secret|sig|credential|password)[^=\s&]*=)[^&\s]+"
)


def scrub(value: Any) -> Any:
    """Replace user names, passwords and signed parameters of URLs in a tree of plain values."""
    if isinstance(value, str):
        return SECRET.sub(lambda m: f"{m[1]}***@" if m[1] else f"{m[2]}***", value)
    if isinstance(value, Mapping):
        return {key: scrub(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [scrub(inner) for inner in value]
    return value
