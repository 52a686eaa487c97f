"""Qwen-Image's attention, over a picture and its text together, without a mask for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HALF = frozenset((torch.bfloat16, torch.float16))


class JointAttention:
    """Attends like diffusers' QwenDoubleStreamAttnProcessor2_0, whose place it takes.

    A mask keeps attention from the fast kernels. On GPUs padded rows therefore go as sequences of
    unequal lengths, of which only the device has to know: each row is one of what is real, and one
    of its padding, which attends to itself and is not looked at.
    """

    # Which the stock classes set, and nothing here reads.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b image width"],
        encoder_hidden_states: Float[Tensor, "b text width"],
        encoder_hidden_states_mask: Bool[Tensor, "b text"] | None = None,
        attention_mask: None = None,
        texts: Bool[Tensor, "b text"] | None = None,
        image_rotary_emb: tuple[Complex[Tensor, "image _"], Complex[Tensor, "text _"]]
        | None = None,
    ) -> tuple[Float[Tensor, "b image width"], Float[Tensor, "b text width"]]:
        """Return what the image stream and the text stream get.

        texts: the mask, past the stock network, which would make the host wait for it.
        """
        assert image_rotary_emb is not None, "positions are part of every stock call"
        image, text, size = hidden_states, encoder_hidden_states, attn.inner_dim // attn.heads

        def heads(x: Tensor) -> Tensor:
            parts: Tensor = x.unflatten(-1, (-1, size))
            return parts

        at_image, at_text = image_rotary_emb
        q = rotate(attn.norm_q(heads(attn.to_q(image))), at_image)
        k = rotate(attn.norm_k(heads(attn.to_k(image))), at_image)
        v = heads(attn.to_v(image))
        q_text = rotate(attn.norm_added_q(heads(attn.add_q_proj(text))), at_text)
        k_text = rotate(attn.norm_added_k(heads(attn.add_k_proj(text))), at_text)
        v_text = heads(attn.add_v_proj(text))
        pairs = ((q_text, q), (k_text, k), (v_text, v))
        mask = encoder_hidden_states_mask if texts is None else texts
        if mask is None or q.device.type != "cuda" or q.dtype not in HALF:
            found = masked(*(torch.cat(pair, dim=1) for pair in pairs), mask=mask).flatten(2)
            of_text, of_image = found.split([text.shape[1], image.shape[1]], dim=1)
        else:  # the padding comes last
            joint = [torch.cat((ours, theirs), dim=1) for theirs, ours in pairs]
            found = in_sequences(*joint, lengths=image.shape[1] + mask.sum(1)).flatten(2)
            of_image, of_text = found.split([image.shape[1], text.shape[1]], dim=1)
        out: Tensor = attn.to_out[1](attn.to_out[0](of_image.contiguous()))
        return out, attn.to_add_out(of_text.contiguous())


def rotate(
    x: Float[Tensor, "b tokens heads size"], at: Complex[Tensor, "tokens half"]
) -> Float[Tensor, "b tokens heads size"]:
    """Turn neighbouring numbers, as complex ones, by the angles of their positions, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * at[:, None])
        return turned.flatten(-2).type_as(x)
    # The same in real numbers, which a compiler can join with what stands around it.
    real, imaginary = torch.view_as_real(at)[:, None].unbind(-1)
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * real - b * imaginary, a * imaginary + b * real], dim=-1)
    return turned.flatten(-2).type_as(x)


def masked(
    q: Float[Tensor, "b tokens heads size"],
    k: Float[Tensor, "b tokens heads size"],
    v: Float[Tensor, "b tokens heads size"],
    *,
    mask: Bool[Tensor, "b text"] | None,
) -> Float[Tensor, "b tokens heads size"]:
    """Attend to all but padded texts, which stand before the picture."""
    if mask is not None:
        picture = mask.new_ones(len(mask), q.shape[1] - mask.shape[1])
        mask = torch.cat([mask, picture], dim=1)[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def in_sequences(
    q: Float[Tensor, "b tokens heads size"],
    k: Float[Tensor, "b tokens heads size"],
    v: Float[Tensor, "b tokens heads size"],
    *,
    lengths: Tensor,
    attend: Any = None,
) -> Float[Tensor, "b tokens heads size"]:
    """Attend in each row to its first tokens alone, and among those after them alone.

    lengths: (b,), how many come first, at least 1. attend: in place of torch's `varlen_attn`.
    """
    if attend is None:
        from torch.nn.attention.varlen import varlen_attn as attend

    rows, tokens = q.shape[:2]
    starts = torch.arange(rows, device=q.device) * tokens
    ends = torch.stack([starts + lengths, starts + tokens], dim=1).flatten()
    bounds = torch.cat([ends.new_zeros(1), ends]).int()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found: Tensor = attend(*flat, bounds, bounds, tokens, tokens)
    return found.view(rows, tokens, *found.shape[1:])
