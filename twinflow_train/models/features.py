"""Networks whose features pictures are compared in: Inception, DINOv2 and CLIP from local files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from twinflow_train.errors import UserError


class FeatureNet(ABC):
    """A network that turns pictures into features, loaded."""

    @abstractmethod
    def images(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "b features"]:
        """Return the features of 8-bit RGB pictures of any size, float32 on the CPU."""


class TextNet(FeatureNet):
    """One that turns texts into vectors beside those of pictures."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "b features"]:
        """Return the vectors of texts; those longer than the network reads are cut."""


@dataclass(kw_only=True)
class Features:
    """Where a feature network is: the `features` group of `evaluate` and of `evals=prompts`.

    path: a file or folder; nothing is downloaded.
    """

    path: str = "???"

    @property
    def name(self) -> str:
        """Say which it is."""
        return type(self).__name__.lower()

    def check(self) -> None:
        """Refuse what is not there: UserError."""

    def open(self, device: torch.device) -> FeatureNet:
        """Load the network; UserError if it is missing or damaged."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Inception(Features):
    """Inception v3 as the published Frechet distances use it: 2048 features.

    path: the TorchScript file `inception-2015-12-05.pt` that NVIDIA publishes beside StyleGAN2-ADA,
    which holds the weights of the original FID and its resizing.
    """

    def check(self) -> None:
        """Refuse what is not there: UserError."""
        if not Path(self.path).is_file():
            raise UserError(
                f"features.path: there is no file {self.path}; features=inception wants the "
                "TorchScript file inception-2015-12-05.pt that is published with StyleGAN2-ADA"
            )

    def open(self, device: torch.device) -> FeatureNet:
        """Load the file."""
        self.check()
        try:
            net = torch.jit.load(self.path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"features.path: {self.path} is no TorchScript file; features=inception wants "
                "inception-2015-12-05.pt"
            ) from error
        return _Inception(net, device)


class _Inception(FeatureNet):
    def __init__(self, net: Any, device: torch.device) -> None:
        self._net, self._device = net, device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        found = [
            self._net(_bytes(one)[None].to(self._device), return_features=True) for one in pictures
        ]
        return torch.cat(found).float().cpu()


@dataclass(kw_only=True)
class DINOv2(Features):
    """DINOv2: the class token after the last normalisation. path: a folder of `Dinov2Model`."""

    def check(self) -> None:
        """Refuse what is not there: UserError."""
        _folder(self.path, "dinov2", "facebook/dinov2-large")

    def open(self, device: torch.device) -> FeatureNet:
        """Load the folder."""
        self.check()
        # The owner of the library, and heavy: imported only where features are wanted.
        from transformers import BitImageProcessorPil, Dinov2Model

        net, prepare = _loaded(self.path, Dinov2Model, BitImageProcessorPil)
        return _DINOv2(net.to(device), prepare, device)


class _DINOv2(FeatureNet):
    def __init__(self, net: Any, prepare: Any, device: torch.device) -> None:
        self._net, self._prepare, self._device = net, prepare, device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self._prepare(list(pictures), return_tensors="pt")["pixel_values"]
        found: Tensor = self._net(pixel_values=pixels.to(self._device)).pooler_output
        return found.float().cpu()


@dataclass(kw_only=True)
class CLIP(Features):
    """CLIP: the projected vectors of pictures and texts. path: a folder of `CLIPModel`."""

    def check(self) -> None:
        """Refuse what is not there: UserError."""
        _folder(self.path, "clip", "openai/clip-vit-large-patch14")

    def open(self, device: torch.device) -> TextNet:
        """Load the folder."""
        self.check()
        # As for DINOv2.
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        net, prepare = _loaded(self.path, CLIPModel, CLIPImageProcessorPil)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"features.path: {self.path} has no tokenizer of CLIP") from error
        return _CLIP(net.to(device), prepare, tokenizer, device)


class _CLIP(TextNet):
    def __init__(self, net: Any, prepare: Any, tokenizer: Any, device: torch.device) -> None:
        self._net, self._prepare, self._tokenizer = net, prepare, tokenizer
        self._device = device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self._prepare(list(pictures), return_tensors="pt")["pixel_values"]
        found: Tensor = self._net.get_image_features(
            pixel_values=pixels.to(self._device)
        ).pooler_output
        return found.float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        length = self._net.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self._device)
        found: Tensor = self._net.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return found.float().cpu()


def _bytes(picture: Image.Image) -> Tensor:
    """Return a picture's bytes, (3, h, w)."""
    raw = bytearray(picture.convert("RGB").tobytes())
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _folder(path: str, kind: str, example: str) -> None:
    """Refuse a folder that is not one of this kind of network."""
    advice = f"`hf download {example} --local-dir FOLDER` makes one"
    config = Path(path) / "config.json"
    if not config.is_file():
        raise UserError(f"features.path: {path} has no config.json, is it there? {advice}")
    try:
        said = json.loads(config.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"features.path: {config} is damaged ({error!r}); {advice}") from error
    if said != kind:
        raise UserError(f"features.path: {path} holds a {said}, features={kind} was asked for")
    for file in ("model.safetensors", "preprocessor_config.json"):
        if not (Path(path) / file).is_file():
            raise UserError(f"features.path: {path} lacks {file}; {advice}")


def _loaded(path: str, net: Any, prepare: Any) -> tuple[Any, Any]:
    """Load a network and what prepares its pictures; UserError if a file is damaged."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return (
            net.from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval(),
            prepare.from_pretrained(path, local_files_only=True),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"features.path: {path} cannot be loaded ({' '.join(str(error).split())})"
        ) from error


def features_at(path: str) -> Features:
    """Tell which network a file or a folder holds; UserError if it is none that is known."""
    if Path(path).suffix == ".pt":
        return Inception(path=path)
    config = Path(path) / "config.json"
    kinds = {"dinov2": DINOv2, "clip": CLIP}
    try:
        return kinds[json.loads(config.read_text())["model_type"]](path=path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"evals.features: {path} is neither a folder of DINOv2 or CLIP nor Inception's "
            "TorchScript file"
        ) from error
