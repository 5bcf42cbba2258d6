"""Multi-token prediction: modules behind a decoder, each of which predicts a token further ahead.

Module k (from 1) takes, at each token i, the hidden state of the module before it (for the first of the decoder, after
its last norm) and the embedding of token i + k. Both are normed, made one row by a matrix, run through a layer and
normed again: the hidden state from which the decoder's head predicts token i + k + 1. Table and head are the decoder's.

Source: DeepSeek-AI, arXiv 2412.19437, section 2.2. As in the published weights the matrix reads the embedding first.

Legend: T tokens, D model width, C = 2 D, L modules with a router, E experts.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.documents import Segments, ids_of
from ftrain.kernels.pack import following, pack_index
from ftrain.modules import embedding, norm
from ftrain.modules.block import Context
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.moe import RouterStats
from ftrain.modules.spec import ParamSpec, Tree, fan_in

BIASES = "mtp_bias_LE"
"""The balancing biases of the modules' routers, in the state of balancing (`decoder.balance_specs`)."""
_IGNORE = -100


class Ahead(NamedTuple):
    """What a module predicts: the hidden states that the head reads, `[T, D]`, and their labels, int64 `[T]`, -100
    where there is none.
    """

    hidden_TD: Tensor
    labels_T: Tensor


def specs(cfg: DecoderConfig, *, out_gain: float = 1.0) -> dict[str, list[Tree]]:
    """`layers`, a list: for each module of `cfg.mtp` `token_norm`, `hidden_norm`, `w_join_CD`, `layer`, and `norm`.

    >>> from dataclasses import replace
    >>> from ftrain.modules.decoder_config import layer_block, preset
    >>> cfg = preset("llama-tiny")
    >>> [sorted(tree) for tree in specs(replace(cfg, mtp=(layer_block(cfg, 1),)))["layers"]]
    [['hidden_norm', 'layer', 'norm', 'token_norm', 'w_join_CD']]
    """
    d = cfg.d_model
    join = ParamSpec((2 * d, d), (None, "embed"), fan_in(2 * d))
    norms = {name: norm.specs(d, kind=cfg.norm_kind) for name in ("token_norm", "hidden_norm", "norm")}
    return {"layers": [{**norms, "w_join_CD": join, "layer": block.specs(out_gain)} for block in cfg.mtp]}


def apply(
    params: dict[str, Any],
    hidden_TD: Tensor,
    tokens_T: Tensor,
    labels_T: Tensor,
    *,
    positions: Tensor,
    segments: Segments | None,
    cfg: DecoderConfig,
    balance: Tree = None,
) -> tuple[list[Ahead], RouterStats | None]:
    """What each module predicts, and what the routers of all did (tokens without one so far ahead left out), stacked.

    Args:
        params: those of the decoder, whose table is read, with `mtp`.
        hidden_TD: what `decoder.apply` gives for the tokens.
        tokens_T: int64 ids. labels_T: the *next* token of each position, -100 where there is none: that of module k is
            the label k tokens later, in the same document.
        positions, segments, balance: as for `decoder.apply`.

    Raises:
        ValueError: shapes do not fit each other.
    """
    if tokens_T.shape != labels_T.shape or tokens_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"multi-token prediction: tokens {list(tokens_T.shape)} and labels {list(labels_T.shape)} must each be one "
            f"for each of {len(hidden_TD)} hidden states"
        )
    at = Context(positions, segments_T=segments, biases_LE=(balance or {}).get(BIASES))
    last_T = last_of_documents(tokens_T, segments)
    there_T = torch.ones_like(last_T)
    found = []
    for i, (block, own) in enumerate(zip(cfg.mtp, params["mtp"]["layers"], strict=True)):
        tokens_T, labels_T = following(tokens_T), following(labels_T).masked_fill(last_T, _IGNORE)
        there_T = following(there_T) & ~last_T
        tokens_TD = torch.where(there_T[:, None], embedding.apply(params["embedding"], tokens_T), 0)
        parts = (("token_norm", tokens_TD), ("hidden_norm", hidden_TD))
        both_TC = torch.cat([norm.apply(own[name], x_TD, eps=cfg.norm_eps) for name, x_TD in parts], -1)
        here = replace(at, valid_T=there_T)
        rows_TD = here.run_layer(block, own["layer"], both_TC @ own["w_join_CD"], layer=cfg.layers + i)
        hidden_TD = norm.apply(own["norm"], rows_TD, eps=cfg.norm_eps)
        found.append(Ahead(hidden_TD, labels_T))
    return found, at.recorded()


def last_of_documents(tokens_T: Tensor, segments_T: Segments | None) -> Tensor:
    """Whether each token of the pack is the last of its document, bool `[T]`. `tokens_T` only tells how many they are.

    >>> last_of_documents(torch.zeros(3), torch.tensor([0, 0, 1])).tolist()
    [False, True, True]
    """
    place_T = pack_index(tokens_T.shape[0], tokens_T.device)
    last_T = following(place_T) != place_T + 1
    if segments_T is None:
        return last_T
    ids_T = ids_of(segments_T)
    return last_T | (following(ids_T) != ids_T)
