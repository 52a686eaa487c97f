"""The engines by the names of their options."""

from __future__ import annotations

from collections.abc import Mapping

from twinflow_train.engines.base import Engine
from twinflow_train.engines.fsdp2 import FSDP2
from twinflow_train.engines.single import Single
from twinflow_train.engines.zero3 import ZeRO3

ENGINES: Mapping[str, Engine] = {
    "fsdp2": FSDP2(),
    "fsdp2_gathered": FSDP2(reshard=False),
    "zero3": ZeRO3(),
    "single": Single(),
}
