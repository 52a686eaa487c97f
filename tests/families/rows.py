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
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.encoding.tools import picture, write_folder
from tests.pipelines import openuni, qwen_image, qwen_image_edit, sana, sd3, z_image
from twinflow_train.models.base import Model
from twinflow_train.models.loading import filled
from twinflow_train.models.openuni_codec import OpenUniEncoders
from twinflow_train.models.qwen_edit_codec import picture_processor
from twinflow_train.run import GROUPS

SIDE = 64
"""Height and width of the pictures that are trained on, and of those that are drawn."""
CPU = torch.device("cpu")
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
    it. references: pictures to edit that ours draws from.
    """

    option: str
    encoders: str
    size: Model
    write: Callable[[Path], Path]
    draw: Callable[[Path, Path], Picture]
    source: Callable[[Path], Path] = pictures
    prepare: tuple[str, ...] = (f"images.side={SIDE}",)
    references: int = 0

    @property
    def model(self) -> list[str]:
        """The words that choose the tiny size."""
        usual = vars(GROUPS["model"][self.option])
        found = {f.name: vars(self.size)[f.name] for f in fields(self.size)}
        changed = {key: value for key, value in found.items() if value != usual[key]}
        plain = {k: v.name if isinstance(v, Enum) else v for k, v in changed.items()}
        return [f"model={self.option}", *(f"model.{k}={v}" for k, v in plain.items())]


def edits(folder: Path) -> Path:
    """Write five pictures, each with a caption and one picture that it was made of."""
    folder.mkdir(parents=True)
    for number in range(5):
        picture(number, SIDE, SIDE).save(folder / f"{number}.png")
        picture(number + 50, SIDE, SIDE).save(folder / f"{number}.ref0.png")
        (folder / f"{number}.txt").write_text(f"make it picture {number}\n")
    return folder


def edited(tiny: Path, export: Path) -> Picture:
    """Edit a picture in two steps with the stock pipeline around an export's transformer."""
    ours = QwenImageTransformer2DModel.from_pretrained(export / "transformer")
    stock = QwenImageEditPlusPipeline.from_pretrained(
        tiny, transformer=ours, processor=picture_processor(tiny)
    )
    stock.set_progress_bar_config(disable=True)
    found: Picture = stock(
        [picture(50, SIDE, SIDE)], PROMPT, height=SIDE, width=SIDE, num_inference_steps=2,
        true_cfg_scale=1.0, output_type="np",
    ).images[0]  # fmt: skip
    return found


@torch.no_grad()
def connected(tiny: Path, export: Path) -> Picture:
    """Draw in two steps with stock SANA, on what the exported connector makes of the prompt."""
    encoders = OpenUniEncoders(path=str(tiny))
    (answers,) = encoders.open(encoders.find(), CPU).embed([PROMPT], at_once=1)
    net = filled(openuni.SIZE, openuni.SIZE.stored_weights(export), device=CPU, dtype=torch.float32)
    captions = net.stock.captions(answers.tokens[None], None)
    stock = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderDC.from_pretrained(tiny / "vae"),
        transformer=SanaTransformer2DModel.from_pretrained(export / "transformer"),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    stock.set_progress_bar_config(disable=True)
    found: Picture = stock(
        prompt_embeds=captions, prompt_attention_mask=torch.ones(captions.shape[:2]), height=SIDE,
        width=SIDE, num_inference_steps=2, guidance_scale=1.0, use_resolution_binning=False,
        output_type="np",
    ).images[0]  # fmt: skip
    return found


ROWS = {
    "qwen_image": Row(
        option="qwen_image",
        encoders="qwen_image",
        size=qwen_image.SIZE,
        write=qwen_image.write_pipeline,
        draw=drawn_by(QwenImagePipeline, QwenImageTransformer2DModel, true_cfg_scale=1.0),
    ),
    "qwen_image_edit": Row(
        option="qwen_image_edit",
        encoders="qwen_image_edit",
        size=qwen_image_edit.EDIT_SIZE,
        write=qwen_image_edit.write_edit_pipeline,
        draw=edited,
        source=edits,
        prepare=(f"images.side={SIDE}", "source.references=1"),
        references=1,
    ),
    "openuni": Row(
        option="openuni_l",
        encoders="openuni_l",
        size=openuni.SIZE,
        write=openuni.write_pipeline,
        draw=connected,
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
