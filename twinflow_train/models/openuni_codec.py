"""OpenUni's encoders: SANA's autoencoder, and learned queries that a language model answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from twinflow_train.batch import Embedding
from twinflow_train.errors import UserError, listed
from twinflow_train.files import sha256
from twinflow_train.models.codec import Encoders, PipelineFolder, weight_files
from twinflow_train.models.hub import REPOSITORY, download
from twinflow_train.models.joined import load_tensors
from twinflow_train.models.pipeline_codec import in_turn, loading, without_bars
from twinflow_train.models.sana_codec import DeepCompression

VAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
QUERIES = "meta_queries"
"""What the released checkpoint calls them."""
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
WANTED = "Generate an image: {}"
SMALL_FILES = ("*.json", "*.txt", "*.jinja")


@dataclass(kw_only=True)
class OpenUniEncoders(Encoders):
    """The language model of InternVL3, the queries that OpenUni learned for it, and DC-AE.

    path: InternVL3-2B in the format of transformers ("-hf"). vae: a repository or folder of
    AutoencoderDC. queries: OpenUni's `.pth` file. Both are null where `path` is a folder in which
    they lie: the one as `vae/`, the other as the only file of its kind.
    """

    null_prompt: ClassVar[str] = "Generate an image."

    path: str = "OpenGVLab/InternVL3-2B-hf"
    vae: str | None = None
    queries: str | None = None

    def find(self) -> OpenUniFolder:
        """Find all three; UserError if one is missing, not whole or of another family."""
        model = found(self.path, key="encoders.path", revision=self.revision, weights="model")
        of_type(model.path / "config.json", "model_type", "internvl", key="encoders.path")
        here = model.path / "vae"
        vae = found(
            self.vae or (str(here) if here.is_dir() else VAE),
            key="encoders.vae",
            revision=None,
            weights="diffusion_pytorch_model",
        )
        of_type(vae.path / "config.json", "_class_name", "AutoencoderDC", key="encoders.vae")
        return OpenUniFolder(
            model.path, model.name, model.commit, (), vae=vae, queries=self._queries(model.path)
        )

    def open(self, folder: PipelineFolder, device: torch.device) -> OpenUniCodec:
        """Load them: in bfloat16 on a GPU, in float32 on a CPU."""
        assert isinstance(folder, OpenUniFolder), "it is what `find` found"
        return OpenUniCodec(folder, device)

    def _queries(self, beside: Path) -> Path:
        if self.queries is not None:
            return Path(self.queries)
        there = sorted(beside.glob("*.pth"))
        if len(there) != 1:
            raise UserError(
                f"encoders.queries: {len(there)} files in {beside} end in .pth, and one is wanted: "
                "give encoders.queries=FILE, the released checkpoint of OpenUni, "
                "https://huggingface.co/wusize/openuni"
            )
        return there[0]


@dataclass(frozen=True, kw_only=True)
class OpenUniFolder(PipelineFolder):
    """The language model's folder, the autoencoder's, and the file with the queries."""

    vae: PipelineFolder
    queries: Path

    @cached_property
    def learned(self) -> Float[Tensor, "queries width"]:
        """The queries; UserError if the file has none."""
        tensors = load_tensors(self.queries, option="encoders.queries")
        if QUERIES not in tensors:
            raise UserError(
                f"encoders.queries: {self.queries} holds no {QUERIES}: give the released "
                "checkpoint of OpenUni"
            )
        return tensors[QUERIES].float()

    @cached_property
    def revision(self) -> str:
        """Identify all three by a SHA-256."""
        parts = [digest(self), digest(self.vae), self.learned.numpy().tobytes().hex()]
        return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


def digest(folder: PipelineFolder) -> str:
    """Identify a repository's weights: by its commit, or by the files right in the folder."""
    if folder.commit is not None:
        return folder.commit
    files = [path for kind in (*SMALL_FILES, "*.safetensors") for path in folder.path.glob(kind)]
    return json.dumps([[path.name, sha256(path)] for path in sorted(files)])


def found(path: str, *, key: str, revision: str | None, weights: str) -> PipelineFolder:
    """Find a single model's folder or repository; UserError if it is missing or not whole.

    weights: what its files are called, without `.safetensors`.
    """
    folder, commit = Path(path), None
    if not folder.is_dir():
        if not REPOSITORY.fullmatch(path):
            raise UserError(f"{key}: the folder {path} does not exist")
        patterns = [*SMALL_FILES, "*.safetensors"]
        folder = download(path, revision=revision, patterns=patterns, key=key)
        commit = folder.name
    elif revision is not None:
        raise UserError(
            f"encoders.revision is {revision}, but {key} = {path} is a folder: leave it out"
        )
    files = ["config.json", *weight_files(folder, weights, None)]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{key}: {path} is not whole, it lacks {listed(missing)}; download it anew")
    return PipelineFolder(folder, folder.resolve().name if commit is None else path, commit, ())


def of_type(path: Path, name: str, wanted: str, *, key: str) -> None:
    """Refuse a config.json of another class: UserError with both names."""
    try:
        said = json.loads(path.read_text()).get(name)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{key}: {path} is damaged ({error}); download it again") from error
    if said != wanted:
        raise UserError(f"{key}: {path} is of {said}, not {wanted}: give that of OpenUni's family")


class OpenUniCodec(DeepCompression):
    """Encodes with the stock autoencoder, and with the language model's last hidden states."""

    null_prompt = OpenUniEncoders.null_prompt
    usual_size = 512

    def __init__(self, folder: OpenUniFolder, device: torch.device) -> None:
        # Heavy, and the owners of the libraries: imported only where a codec is opened.
        from diffusers import AutoencoderDC
        from transformers import AutoTokenizer, InternVLForConditionalGeneration

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        without_bars()
        with loading(folder.vae.path):
            vae = AutoencoderDC.from_pretrained(
                folder.vae.path, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
        super().__init__(vae.to(device), device)
        with loading(folder.path):
            model = InternVLForConditionalGeneration.from_pretrained(
                folder.path, dtype=dtype, local_files_only=True, use_safetensors=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
        self._model = model.model.language_model.to(device).eval()
        self._queries = folder.learned.to(device, dtype)
        self.text_width = self._model.config.hidden_size
        if self._queries.shape[-1] != self.text_width:
            raise UserError(
                f"encoders.queries: {folder.queries} has queries of width "
                f"{self._queries.shape[-1]}, the language model in {folder.path} has width "
                f"{self.text_width}: give the checkpoint that was trained with it"
            )

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], *, at_once: int) -> list[Embedding]:
        """Return each prompt's embedding, encoding `at_once` a time: one state for each query.

        The null prompt is asked as it is, all others as what an image is wanted of.
        """
        return in_turn(prompts, at_once, self._answered)

    def _answered(self, prompts: list[str]) -> Iterator[Embedding]:
        """Show the language model each prompt and then the queries; yield what it says to these."""
        said = (p if p == self.null_prompt else WANTED.format(p.strip()) for p in prompts)
        ids = [self._tokenizer(ASKED.format(one), return_tensors="pt").input_ids[0] for one in said]
        words = pad_sequence(ids, batch_first=True).to(self._device)
        lengths = torch.tensor([len(one) for one in ids], device=self._device)
        many, rows = len(self._queries), len(prompts)
        seen = torch.arange(words.shape[1], device=self._device) < lengths[:, None]
        seen = torch.cat([seen, seen.new_ones(rows, many)], dim=1)
        states = self._model(
            inputs_embeds=torch.cat(
                [self._model.get_input_embeddings()(words), self._queries.expand(rows, -1, -1)], 1
            ),
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        yield from map(Embedding, states[:, -many:])
