"""Files that others may read: safetensors with the permissions that any new file gets."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to one safetensors file, readable as the umask says.

    safetensors itself makes files that only their owner may read. With several entries of metadata
    it orders them at random: give one where equal tensors shall give equal bytes.
    """
    save_file(dict(tensors), path, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
