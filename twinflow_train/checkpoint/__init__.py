"""Checkpoints of any engine in one format, saved while training goes on."""

from twinflow_train.checkpoint.reading import choose, kinds, whole
from twinflow_train.checkpoint.saves import Checkpoints, Progress, refuse_unusable

__all__ = ["Checkpoints", "Progress", "choose", "kinds", "refuse_unusable", "whole"]
