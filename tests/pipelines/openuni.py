"""OpenUni in one folder: InternVL3, DC-AE, and the released kind of checkpoint beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig
from transformers.models.qwen2 import Qwen2Config

from tests.pipelines import sana, tokenizers
from twinflow_train.models.openuni import OpenUni

WIDTH, QUERIES = 12, 5
SIZE = OpenUni(
    layers=2, heads=4, head_dim=4, cross_heads=2, channels=sana.CHANNELS, text_width=WIDTH,
    caption_width=10, connector_layers=2, connector_heads=3, connector_hidden=20,
)  # fmt: skip
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def write_pipeline(folder: Path) -> Path:
    """Write the folder and return it; the same values every time."""
    words = tokenizers.qwen("user assistant Generate an image: of a red apple", SPECIAL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(
            InternVLConfig(
                vision_config=InternVLVisionConfig(
                    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    image_size=[28, 28], patch_size=[14, 14],
                ),
                text_config=Qwen2Config(
                    vocab_size=tokenizers.VOCABULARY, hidden_size=WIDTH, intermediate_size=20,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                ),
                image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
            )
        )  # fmt: skip
        autoencoder = sana.autoencoder()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    autoencoder.save_pretrained(folder / "vae")
    tensors = released(SIZE, queries=QUERIES)
    torch.save(tensors, folder / "openuni_tiny.pth")
    stock = SanaTransformer2DModel(**SIZE.stock_arguments())
    own = (name for name in tensors if name.startswith("transformer."))
    stock.load_state_dict({name.removeprefix("transformer."): tensors[name] for name in own})
    stock.save_pretrained(folder / "transformer")
    return folder


def released(size: OpenUni, *, queries: int) -> dict[str, Tensor]:
    """Name random tensors as the released checkpoint names its own, SANA's by their own class."""
    draws = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=draws)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = SanaTransformer2DModel(**size.stock_arguments()).state_dict()
    found = {f"transformer.{k}": v + 0.1 * some(*v.shape) for k, v in stock.items()}
    width, hidden = size.text_width, size.connector_hidden
    for n in range(size.connector_layers):
        layer = f"connector.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = some(width, width)
            found[f"{layer}.self_attn.{name}.bias"] = some(width)
        for name in ("layer_norm1", "layer_norm2"):
            found[f"{layer}.{name}.weight"] = 1 + some(width)
            found[f"{layer}.{name}.bias"] = some(width)
        found[f"{layer}.mlp.fc1.weight"] = some(hidden, width)
        found[f"{layer}.mlp.fc1.bias"] = some(hidden)
        found[f"{layer}.mlp.fc2.weight"] = some(width, hidden)
        found[f"{layer}.mlp.fc2.bias"] = some(width)
    found["projector.weight"] = some(size.caption_width, width)
    found["projector.bias"] = some(size.caption_width)
    found["meta_queries"] = some(queries, width)
    return found
