"""What a run can choose to be evaluated by."""

from __future__ import annotations

from collections.abc import Mapping

from twinflow_train.evals.prompts import Prompts
from twinflow_train.evals.suite import Evals, Judged, NoEvals

EVALS: Mapping[str, Evals] = {
    "digits": Judged(),
    "emoji": Judged(judge="datasets/emoji-few/judge.safetensors"),
    "prompts": Prompts(),
    "none": NoEvals(),
}
"""The options of the group `evals`, by name."""
