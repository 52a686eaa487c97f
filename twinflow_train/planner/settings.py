"""What a plan reckons with that is not in a run's other options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from twinflow_train.errors import check


class Asked(Enum):
    """What becomes of a run whose plan does not fit its GPUs: refused, warned of, or not planned.

    YAML 1.1 reads a bare `off` as false: the option that plans nothing is called `skip`.
    """

    refuse = "refuse"
    warn = "warn"
    skip = "skip"


@dataclass(kw_only=True)
class Plans:
    """How a run is planned.

    check: what training does at its start, on GPUs, if the plan does not fit.
    pixels, tokens: side of the largest image, and tokens of the longest text, that
    `python -m twinflow_train.plan` reckons with; training looks at its data instead.
    references: reference images a sample.
    """

    check: Asked = Asked.refuse
    pixels: int = 512
    tokens: int = 256
    references: int = 0

    def __post_init__(self) -> None:
        check("plan", self, self._rules())

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "pixels", self.pixels >= 1, "1 or more"
        yield "tokens", self.tokens >= 1, "1 or more"
        yield "references", self.references >= 0, "0 or more"
