"""Mochi's attention with fixed shapes: diffusers' own looks up which tokens of a prompt count, sample by sample.

Legend: B rows, L tokens of a row's latents, S tokens of its prompt, H heads, K head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn


def use_fixed_shapes(module: nn.Module) -> None:
    """Give each attention of Mochi within `module` the processor of this file, as diffusers lets one choose it."""
    from diffusers.models.attention_processor import MochiAttention

    attentions: list[Any] = [inner for inner in module.modules() if isinstance(inner, MochiAttention)]
    for attention in attentions:
        attention.processor = FixedShapes()


class FixedShapes:
    """A processor for diffusers' `MochiAttention` that gives what its own gives, and reads no number on the host.

    The prompt's tokens that count come first in the result, and zeros stand for the others, as there.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`[B, L, D]` and `[B, S, D]` of latents and prompt. `attention_mask`: `[B, S]`, nonzero for what counts."""
        own = [_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v)]
        prompt = [
            _heads(project(encoder_hidden_states), attn.heads)
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        for pair, norms in ((own, (attn.norm_q, attn.norm_k)), (prompt, (attn.norm_added_q, attn.norm_added_k))):
            pair[:2] = [x if norm is None else norm(x) for x, norm in zip(pair, norms, strict=False)]
        if image_rotary_emb is not None:
            own[:2] = [_turned(x, *image_rotary_emb) for x in own[:2]]
        counts_BS = attention_mask != 0
        first_BS = (~counts_BS).to(torch.int32).argsort(dim=1, stable=True)
        prompt = [x.gather(1, first_BS[:, :, None, None].expand_as(x)) for x in prompt]
        seen_BS = counts_BS.gather(1, first_BS)
        seen = torch.cat([torch.ones_like(own[0][:, :, 0, 0], dtype=torch.bool), seen_BS], 1)
        q, k, v = (torch.cat([x, y], 1).transpose(1, 2) for x, y in zip(own, prompt, strict=True))
        out = nn.functional.scaled_dot_product_attention(q, k, v, seen[:, None, None, :])
        latents, texts = out.transpose(1, 2).flatten(2).split([hidden_states.shape[1], seen_BS.shape[1]], 1)
        texts = texts.masked_fill(~seen_BS[:, :, None], 0)
        latents = attn.to_out[1](attn.to_out[0](latents))
        return latents, attn.to_add_out(texts) if hasattr(attn, "to_add_out") else texts


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, L, D]` as `[B, L, H, K]`."""
    return x.unflatten(2, (heads, -1))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with pairs of neighbouring numbers turned, in float32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)], -1)
    return turned.flatten(-2)
