"""Images from prompts, with the weights of a run, an export or a diffusers folder."""

from twinflow_train.sampling.pipeline import Drawn, TwinFlowPipeline

__all__ = ["Drawn", "TwinFlowPipeline"]
