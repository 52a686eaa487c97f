"""Checks the shapes and types of layers 0 to 2 at every call, in tests only.

Importing this module installs the hook, so it must come before the package is imported.
TWINFLOW_TYPE_HOOK=0 in the environment switches it off.
"""

from __future__ import annotations

import os

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

HOOKED = tuple(
    f"twinflow_train.{name}"
    for name in ("batch", "rng", "dist", "deal", "passes", "flow", "models", "data", "objectives")
)
ACTIVE = os.environ.get("TWINFLOW_TYPE_HOOK", "1") != "0"

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is a float, as PEP 484 has it."""

if ACTIVE:
    install_import_hook(list(HOOKED), "tests.typing_hook.checker")
