"""Every family from pictures to a picture: what `tests/families/test_whole_path.py` needs of it.

To add a family: a module in `tests/pipelines/` with a tiny pipeline in the released format, the
slow imports of that pipeline in `tests/families/server.py`, and a `Row` in ROWS. What differs from
the others goes into the row: how the source of its training data is written, what `prepare` is
told besides, and how its stock pipeline draws with the exported transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from diffusers import (
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.encoding.tools import write_folder
from tests.pipelines import qwen_image, sana, sd3, z_image
from twinflow_train.models.base import Model
from twinflow_train.run import GROUPS

SIDE = 64
"""Height and width of the pictures that are trained on, and of those that are drawn."""
PROMPT = "picture of a red apple"
Picture = npt.NDArray[np.float32]


def pictures(folder: Path) -> Path:
    """Write nine pictures with one or two captions each."""
    return write_folder(folder, range(0, 36, 4))


def drawn_by(pipeline: type[Any], transformer: type[Any], **how: Any) -> Callable[..., Picture]:
    """Draw in two steps with a stock pipeline around an export's transformer."""

    def draw(tiny: Path, export: Path) -> Picture:
        ours = transformer.from_pretrained(export / "transformer")
        stock = pipeline.from_pretrained(tiny, transformer=ours)
        stock.set_progress_bar_config(disable=True)
        size = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
        found: Picture = stock(PROMPT, **size, **how, output_type="np").images[0]
        return found

    return draw


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One family.

    option: of the group model. encoders: of the group encoders. size: of the tiny pipeline's
    transformer. write: writes that pipeline. draw(pipeline, export): a picture in [0, 1] of shape
    (SIDE, SIDE, 3). source: writes what training data are prepared from. prepare: more words for
    it.
    """

    option: str
    encoders: str
    size: Model
    write: Callable[[Path], Path]
    draw: Callable[[Path, Path], Picture]
    source: Callable[[Path], Path] = pictures
    prepare: tuple[str, ...] = (f"images.side={SIDE}",)

    @property
    def model(self) -> list[str]:
        """The words that choose the tiny size."""
        usual = vars(GROUPS["model"][self.option])
        found = {f.name: vars(self.size)[f.name] for f in fields(self.size)}
        changed = {key: value for key, value in found.items() if value != usual[key]}
        plain = {k: v.name if isinstance(v, Enum) else v for k, v in changed.items()}
        return [f"model={self.option}", *(f"model.{k}={v}" for k, v in plain.items())]


ROWS = {
    "qwen_image": Row(
        option="qwen_image",
        encoders="qwen_image",
        size=qwen_image.SIZE,
        write=qwen_image.write_pipeline,
        draw=drawn_by(QwenImagePipeline, QwenImageTransformer2DModel, true_cfg_scale=1.0),
    ),
    "sana": Row(
        option="sana_0.6b",
        encoders="sana",
        size=sana.SIZE,
        write=sana.write_pipeline,
        draw=drawn_by(SanaPipeline, SanaTransformer2DModel, use_resolution_binning=False),
    ),
    "sd3": Row(
        option="sd35_medium",
        encoders="sd35_medium",
        size=sd3.SIZE,
        write=sd3.write_pipeline,
        draw=drawn_by(StableDiffusion3Pipeline, SD3Transformer2DModel),
    ),
    "z_image": Row(
        option="z_image",
        encoders="z_image",
        size=z_image.SIZE,
        write=z_image.write_pipeline,
        draw=drawn_by(ZImagePipeline, ZImageTransformer2DModel, guidance_scale=2.0),
    ),
}
