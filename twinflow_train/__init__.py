"""TwinFlow Train: turn a pretrained flow-matching transformer into a 1-, 2- or 4-step generator."""

__version__ = "0.1.0"
