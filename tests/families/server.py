"""A server of programs that prepare shards of any family: it has imported what encoding takes."""

from __future__ import annotations

import importlib
from functools import partial

from tests.forking import fork_on_request
from tests.program import become

if __name__ == "__main__":
    # Whatever is slow to import; no thread may have started before a fork.
    for name in (
        "diffusers.pipelines.qwenimage.pipeline_qwenimage",
        "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
        "diffusers.pipelines.sana.pipeline_sana",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "diffusers.pipelines.z_image.pipeline_z_image",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.clip.modeling_clip",
        "transformers.models.gemma2.modeling_gemma2",
        "transformers.models.internvl.modeling_internvl",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.t5.modeling_t5",
        "twinflow_train.launch",
        "twinflow_train.encoding.job",
    ):
        importlib.import_module(name)
    fork_on_request(partial(become, module="twinflow_train.prepare"))
