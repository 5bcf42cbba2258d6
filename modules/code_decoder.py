"""Codes out of a foundation: it predicts the codes of a frozen tokenizer one after the other.

What images (modules/image_decoder.py) and sounds (modules/audio_decoder.py) share. In the stream a code is its
embedding plus a learned embedding of its place among its item's codes; the head is a linear map of the hidden state
before it. The tokenizer is trained beforehand and frozen here: only its codes enter.

Legend: B items, N codes of one item, n rows, D foundation width, C distinct codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.mean import Mean
from ftrain.modules.omni import Decoder, Row
from ftrain.modules.spec import Normal, ParamSpec, Tree

IGNORE = -100


@dataclass(frozen=True)
class Codec:
    """A tokenizer: `specs` of its parameters, `encode(params, target_B...) -> codes [B, N]` int64 without gradient,
    `decode(params, codes_BN) -> target_B...`, one `target`'s shape and dtype, how many codes that is, and how many
    distinct ones there are (`vocabulary`).
    """

    specs: Tree
    encode: Callable[[Tree, Tensor], Tensor]
    decode: Callable[[Tree, Tensor], Tensor]
    target: Row
    codes: int
    vocabulary: int


def specs(codec: Codec, d_model: int, *, init_std: float = 0.02) -> dict[str, Any]:
    """`tokenizer` (frozen), `codes_CD` and `places_ND` (embeddings), `head_DC`."""
    d, codes, places, init = d_model, codec.vocabulary, codec.codes, Normal(init_std)
    return {
        "tokenizer": codec.specs,
        "codes_CD": ParamSpec((codes, d), ("codebook", "embed"), init),
        "places_ND": ParamSpec((places, d), ("position", "embed"), init),
        "head_DC": ParamSpec((d, codes), ("embed", "codebook"), init),
    }


def lm_encode(params: Any, target_B: Tensor, *, codec: Codec) -> tuple[Tensor, Tensor]:
    """Targets `[B, ...]` to rows of the stream `[B*N, D]` (in the dtype of the embeddings) and codes `[B*N]`, int64; no
    gradient reaches the tokenizer. ValueError for targets of another shape than the tokenizer's.
    """
    codes_BN = codec.encode(params["tokenizer"], target_B)
    return lm_embed(params, codes_BN), codes_BN.flatten()


def lm_embed(params: Any, codes_BN: Tensor) -> Tensor:
    """Codes `[B, N]` to rows of the stream `[B*N, D]`."""
    rows_BND = embedding(codes_BN.flatten(), params["codes_CD"]).unflatten(0, tuple(codes_BN.shape))
    return (rows_BND + params["places_ND"]).flatten(0, 1)


def lm_head(params: Any, hidden_nD: Tensor, codes_n: Tensor) -> Mean:
    """Cross entropy in nats of each code given the hidden state before it; codes of -100 count nothing."""
    total = linear_cross_entropy(hidden_nD, params["head_DC"], codes_n, ignore_index=IGNORE)
    return Mean(total, (codes_n != IGNORE).to(torch.float32).sum())


def lm_logits(params: Any, hidden_nD: Tensor) -> Tensor:
    """Scores of every code given the hidden state before it, `[n, C]`."""
    return hidden_nD @ params["head_DC"]


def decoder(codec: Codec, d_model: int, *, init_std: float = 0.02, begin: int, end: int) -> Decoder:
    """The modality for `OmniModel`; `begin` and `end` are token ids."""
    return Decoder(
        specs=specs(codec, d_model, init_std=init_std),
        lm_encode=lambda params, target_B: lm_encode(params, target_B, codec=codec),
        lm_head=lm_head,
        lm_logits=lm_logits,
        lm_embed=lm_embed,
        lm_generate=lambda params, codes_BN: codec.decode(params["tokenizer"], codes_BN),
        target=codec.target,
        codes_per_target=codec.codes,
        begin=begin,
        end=end,
        frozen=("tokenizer",),
    )
