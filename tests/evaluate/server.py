"""A server of programs that evaluate: it has imported what that takes."""

from __future__ import annotations

import importlib
from functools import partial

from tests.forking import fork_on_request
from tests.program import become

if __name__ == "__main__":
    # Whatever is slow to import; no thread may have started before a fork.
    for name in (
        "diffusers.pipelines.qwenimage.pipeline_qwenimage",
        "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
        "diffusers.loaders",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.clip.modeling_clip",
        "twinflow_train.launch",
        "twinflow_train.evaluate.job",
    ):
        importlib.import_module(name)
    fork_on_request(partial(become, module="twinflow_train.evaluate"))
