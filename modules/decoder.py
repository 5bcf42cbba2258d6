"""The decoder stack of the Llama and Qwen families: embedding, layers of attention and an MLP or experts, norm, head.

Each layer is a `Block` (modules/block.py): the built-in one, or another that the configuration gives. Layers are a
Python loop over a list: in a trace they are equal regions, which a pass can find. The stack takes tokens or ready
embeddings, so an omni model can put images among them.

For generation `prefill` runs whole prompts and keeps their keys and values, and `extend` runs one more token of each:
the same layers, whose queries then read from the cache (modules/kv_cache.py).

Legend: T tokens, B sequences, D model width, V vocabulary, E experts, L layers with experts, A position axes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.chunks import PIECE
from ftrain.kernels.documents import Segments, ids_of
from ftrain.kernels.embedding import merge_rows
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.linear_token_losses import linear_token_losses
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import following
from ftrain.modules import embedding, kv_cache, moe, multi_token, norm
from ftrain.modules.block import Context, Newest, Prompts
from ftrain.modules.decoder_config import PRESETS, DecoderConfig, layer_block, layer_with, preset
from ftrain.modules.kv_cache import KvCache
from ftrain.modules.moe import RouterStats
from ftrain.modules.spec import Normal, ParamSpec, Tree

__all__ = [
    "IGNORE",
    "PRESETS",
    "Added",
    "DecoderConfig",
    "DecoderStats",
    "apply",
    "apply_layer",
    "balance_specs",
    "embed",
    "extend",
    "layer_block",
    "layer_with",
    "logits",
    "loss",
    "next_token_labels",
    "prefill",
    "preset",
    "specs",
    "update_balance",
]

IGNORE = -100


class DecoderStats(NamedTuple):
    """What a pass through the stack tells besides its output.

    `router`: `load_E` and `probability_E` `[L, E]` and `count` `[L]`, stacked over the layers with experts; or `None`.
    `mtp`: the same of the modules of multi-token prediction, where they ran (`ftrain.modules.multi_token.apply`).
    `kept`: the streams `[T, D]` that `apply` was asked to keep, in the order in which it was.
    """

    router: RouterStats | None
    mtp: RouterStats | None = None
    kept: tuple[Tensor, ...] = ()


class Added(NamedTuple):
    """Rows that are added to the stream behind the first layers (DeepStack, Meng et al. 2024), of a few of its tokens.

    `rows`: for each of these layers, `[n, D]`; `index_n`: int64, the token of each row, T for none.
    """

    rows: tuple[Tensor, ...] = ()
    index_n: Tensor | None = None

    def behind(self, layer: int, x_TD: Tensor) -> Tensor:
        """The stream behind layer number `layer`, with its rows."""
        if layer >= len(self.rows) or self.index_n is None:
            return x_TD
        return x_TD + merge_rows(torch.zeros_like(x_TD), self.rows[layer], self.index_n)


NOTHING_ADDED = Added()


def specs(cfg: DecoderConfig) -> dict[str, Any]:
    """`embedding`, `layers` (a list), `norm`, `head.w_DV` unless the embeddings are tied, and `mtp.layers` (a list)
    with modules of multi-token prediction (`ftrain.modules.multi_token`).

    The last weight of each residual branch starts smaller by `1 / sqrt(2 * layers)` (Radford et al. 2019), so that the
    residual stream's variance does not grow with depth.

    >>> from ftrain.modules import spec
    >>> spec.count(specs(preset("llama-tiny")))
    106816
    """
    gain = (2 * cfg.layers) ** -0.5
    tree: dict[str, Any] = {
        "embedding": embedding.specs(cfg.vocab, cfg.d_model, init=Normal(cfg.init_std)),
        "layers": [layer_block(cfg, i).specs(gain) for i in range(cfg.layers)],
        "norm": norm.specs(cfg.d_model, kind=cfg.norm_kind),
    }
    if not cfg.tie_embeddings:
        tree["head"] = {"w_DV": ParamSpec((cfg.d_model, cfg.vocab), ("embed", "vocab"), Normal(cfg.init_std))}
    if cfg.mtp:
        tree["mtp"] = multi_token.specs(cfg, out_gain=gain)
    return tree


def balance_specs(cfg: DecoderConfig) -> dict[str, Any]:
    """The state of loss-free balancing: `router_bias_LE`, one row per router, and of those in `mtp` `mtp_bias_LE`;
    empty for other balances.
    """
    if cfg.balance != "bias":
        return {}
    one = moe.balance_specs((*cfg.routers, *cfg.mtp_routers)[0])["router_bias_E"]
    rows = {"router_bias_LE": len(cfg.routers), multi_token.BIASES: len(cfg.mtp_routers)}
    return {name: ParamSpec((n, *one.shape), ("layers", *one.axes), one.init) for name, n in rows.items() if n}


def embed(params: dict[str, Any], tokens_T: Tensor) -> Tensor:
    """Token ids `[T]` to embeddings `[T, D]`."""
    return embedding.apply(params["embedding"], tokens_T)


def apply(
    params: dict[str, Any],
    x: Tensor,
    *,
    positions: Tensor,
    segments: Segments | None,
    cfg: DecoderConfig,
    balance: Tree = None,
    valid: Tensor | None = None,
    added: Added = NOTHING_ADDED,
    keep: Sequence[int] = (),
) -> tuple[Tensor, DecoderStats]:
    """Tokens `[T]` (integers) or embeddings `[T, D]` (floats) to the hidden states after the last norm, `[T, D]`.

    `positions`: `[T]`, or `[A, T]` with several position axes, starting again in each document. `segments`: `[T]`
    int64 document ids, equal ids adjacent, or `Documents`, with which a CUDA device never waits; `None` is one
    document. `balance`: the state of `balance_specs`, given exactly where the balance is "bias". `valid`: `[T]` bool,
    false for padding, which routers then do not count. `added`: rows for the first layers. `keep`: which streams the
    statistics hold beside, as transformers counts hidden states: 0 is what the first layer reads, i what layer i - 1
    makes of it, before rows are added, and the number of layers the result. ValueError where shapes do not fit `cfg` or
    each other, and for a stream that is not there.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = preset("qwen3-moe-tiny")
    >>> params = spec.init(specs(cfg), random.key(0))
    >>> tokens_T, positions_T, segments_T = torch.tensor([[5, 6, 7], [0, 1, 0], [0, 0, 1]])
    >>> hidden_TD, stats = apply(params, tokens_T, positions=positions_T, segments=segments_T, cfg=cfg)
    >>> list(hidden_TD.shape), list(stats.router.load_E.shape)
    ([3, 64], [2, 8])
    """
    x_TD = x if x.is_floating_point() else embed(params, x)
    _check_inputs(params, x_TD, positions, segments, cfg)
    at = Context(positions, segments_T=segments, valid_T=valid, biases_LE=_biases(balance))
    streams: dict[int, Tensor | None] = dict.fromkeys(keep)
    _check_kept(keep, cfg)
    x_TD = _stack(params, x_TD, at, cfg=cfg, added=added, streams=streams)
    hidden_TD = streams[cfg.layers] = _last_norm(params, x_TD, cfg)
    kept = tuple(stream for stream in (streams[i] for i in keep) if stream is not None)
    return hidden_TD, DecoderStats(at.recorded(), kept=kept)


def prefill(
    params: dict[str, Any],
    x_TD: Tensor,
    *,
    positions: Tensor,
    length_B: Tensor,
    room: int,
    cfg: DecoderConfig,
    balance: Tree = None,
    added: Added = NOTHING_ADDED,
) -> tuple[Tensor, KvCache]:
    """Hidden states `[T, D]` of B packed sequences, as of `apply`, and the cache from which `extend` goes on.

    `length_B`: int64, how many tokens each sequence has, in the order of the pack; one may have none, which segments
    could not say. `room`: how many tokens each will be extended by at most. `positions`, `balance`, `added`: as in
    `apply`.
    ValueError if there is no token at all, if lengths are not the pack's, or if attention is not causal.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = preset("llama-tiny")
    >>> params = spec.init(specs(cfg), random.key(0))
    >>> x_TD, length_B = embed(params, torch.tensor([5, 6, 7])), torch.tensor([2, 1])
    >>> hidden_TD, cache = prefill(
    ...     params, x_TD, positions=torch.tensor([0, 1, 0]), length_B=length_B, room=4, cfg=cfg
    ... )
    >>> newest_BD = embed(params, torch.tensor([8, 9]))
    >>> hidden_BD, cache = extend(params, newest_BD, positions=length_B, cache=cache, cfg=cfg)
    >>> cache.length_B.tolist(), cache.room
    ([3, 2], 3)
    """
    if not len(x_TD):
        raise ValueError(f"decoder: {len(length_B)} sequences without a token: at least one of them must have begun")
    unpacking = kv_cache.unpacking(length_B, tokens=len(x_TD), room=room)
    segments_T = torch.repeat_interleave(length_B)
    _check_inputs(params, x_TD, positions, segments_T, cfg)
    at = Prompts(positions, segments_T=segments_T, biases_LE=_biases(balance), length_B=length_B, unpacking=unpacking)
    x_TD = _stack(params, x_TD, at, cfg=cfg, added=added)
    return _last_norm(params, x_TD, cfg), KvCache(tuple(at.entries), length_B, room)


def extend(
    params: dict[str, Any],
    x_BD: Tensor,
    *,
    positions: Tensor,
    cache: KvCache,
    cfg: DecoderConfig,
    balance: Tree = None,
) -> tuple[Tensor, KvCache]:
    """Hidden states `[B, D]` of one more token per sequence, and the cache with it; the given cache is used up.

    `positions`: those of the new tokens, `[B]` or `[A, B]`. Tokens so few that a fast kernel's call costs more than its
    work run on reference kernels, all but experts, which in plain torch would each compute every token. ValueError
    where the cache has no room left, another number of sequences, or is of another configuration.
    """
    _check_inputs(params, x_BD, positions, None, cfg)
    if len(x_BD) != len(cache.length_B):
        raise ValueError(
            f"decoder: {len(x_BD)} new tokens for a cache of {len(cache.length_B)} sequences: give one each"
        )
    if cache.room < 1:
        raise ValueError(f"decoder: the cache of {len(x_BD)} sequences is full: give prefill a larger room")
    at = Newest(
        positions,
        biases_LE=_biases(balance),
        length_B=cache.length_B,
        room=cache.room - 1,
        given=cache.layers,
        few=x_BD.numel() <= PIECE,
    )
    x_BD = _stack(params, x_BD, at, cfg=cfg)
    if len(at.entries) < len(cache.layers):
        raise ValueError(
            f"decoder: the cache holds what {len(cache.layers)} attentions and other blocks have kept, of which "
            f"{len(at.entries)} were asked for: go on with the configuration that made it"
        )
    with at.cheaply():
        hidden_BD = _last_norm(params, x_BD, cfg)
    return hidden_BD, KvCache(tuple(at.entries), cache.length_B + 1, at.room)


def apply_layer(params: dict[str, Any], x_TD: Tensor, *, layer: int, cfg: DecoderConfig, at: Context) -> Tensor:
    """Layer number `layer` by itself, `[T, D]` to `[T, D]`; `at` says where the tokens are (`ftrain.modules.block`).

    ValueError where it changes the shape or the dtype of the rows.
    """
    return at.run_layer(layer_block(cfg, layer), params, x_TD, layer=layer)


def _stack(
    params: dict[str, Any],
    x_TD: Tensor,
    at: Context,
    *,
    cfg: DecoderConfig,
    added: Added = NOTHING_ADDED,
    streams: dict[int, Tensor | None] | None = None,
) -> Tensor:
    """All layers; what they keep and count is left in `at`, and the streams that are asked for in `streams`."""
    kept: dict[int, Tensor | None] = {} if streams is None else streams
    at.rope(cfg.attention)  # before the layers, of which it is no part
    for i, layer in enumerate(params["layers"]):
        if i == 0 and i in kept:
            kept[i] = x_TD
        x_TD = apply_layer(layer, x_TD, layer=i, cfg=cfg, at=at)
        if i + 1 in kept:
            kept[i + 1] = x_TD
        x_TD = added.behind(i, x_TD)
    at.recorded()  # checked, in generation too
    return x_TD


def _check_kept(keep: Sequence[int], cfg: DecoderConfig) -> None:
    strange = [i for i in keep if not 0 <= i <= cfg.layers]
    if strange:
        raise ValueError(
            f"decoder: keep={tuple(keep)} names stream {strange[0]}: {cfg.layers} layers have 0 to that number"
        )


def _biases(balance: Tree) -> Tensor | None:
    return (balance or {}).get("router_bias_LE")


def _last_norm(params: dict[str, Any], x_TD: Tensor, cfg: DecoderConfig) -> Tensor:
    return norm.apply(params["norm"], x_TD, eps=cfg.norm_eps)


def _head(params: dict[str, Any], cfg: DecoderConfig) -> tuple[Tensor, bool]:
    """The weight of the head, `[V, D]` where it is the table of tokens (then True), else `[D, V]`."""
    tied = cfg.tie_embeddings
    return (params["embedding"]["table_VD"] if tied else params["head"]["w_DV"]), tied


def logits(params: dict[str, Any], hidden_TD: Tensor, cfg: DecoderConfig) -> Tensor:
    """Scores of every next token, `[T, V]`: for generation; a loss does not need them (see `loss`)."""
    return hidden_TD @ (params["embedding"]["table_VD"].T if cfg.tie_embeddings else params["head"]["w_DV"])


def loss(
    params: dict[str, Any], hidden_TD: Tensor, labels_T: Tensor, cfg: DecoderConfig, *, weights_T: Tensor | None = None
) -> Mean:
    """Cross entropy of each position's label, in nats, without holding `[T, V]` logits.

    `labels_T`: the *next* token of each position (see `next_token_labels`), -100 where there is none. `weights_T`: a
    constant weight per position; the mean is then over the sum of weights.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = preset("llama-tiny")
    >>> params = spec.init(specs(cfg), random.key(0))
    >>> tokens_T = torch.tensor([5, 6, 7])
    >>> hidden_TD, _ = apply(params, tokens_T, positions=torch.arange(3), segments=None, cfg=cfg)
    >>> mean = loss(params, hidden_TD, next_token_labels(tokens_T, None), cfg)
    >>> mean.count.item(), 4.5 < mean.value().item() < 6.5  # near log(256), the loss of guessing
    (2.0, True)
    """
    head, tied = _head(params, cfg)
    weights_T = None if weights_T is None else weights_T.detach()
    total = linear_cross_entropy(hidden_TD, head, labels_T, ignore_index=IGNORE, weights_T=weights_T, transposed=tied)
    labelled_T = labels_T != IGNORE
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    counted_T = labelled_T.to(wide) if weights_T is None else torch.where(labelled_T, weights_T.to(wide), 0)
    return Mean(total, counted_T.sum())


def token_losses(params: dict[str, Any], hidden_TD: Tensor, labels_T: Tensor, cfg: DecoderConfig) -> Tensor:
    """The cross entropy of each position's label, `[T]` in nats, 0 where it is -100: what `loss` adds up."""
    head, tied = _head(params, cfg)
    return linear_token_losses(hidden_TD, head, labels_T, ignore_index=IGNORE, transposed=tied)


def next_token_labels(tokens_T: Tensor, segments_T: Segments | None) -> Tensor:
    """The label of each token, int64 `[T]`, is the token after it; -100 for the last of each document.

    >>> next_token_labels(torch.tensor([7, 8, 9]), torch.tensor([0, 0, 1])).tolist()
    [8, -100, -100]
    """
    return following(tokens_T).masked_fill(multi_token.last_of_documents(tokens_T, segments_T), IGNORE)


def update_balance(balance: Tree, stats: DecoderStats, *, rate: float) -> Tree:
    """The state of loss-free balancing after a step with these statistics (see `moe.update_bias`); biases of routers
    that did not run stay as they are.
    """
    of = {"router_bias_LE": stats.router, multi_token.BIASES: stats.mtp}
    return {
        name: bias_LE if found is None else moe.update_bias(bias_LE, found.load_E, rate=rate)
        for name, bias_LE in balance.items()
        for found in (of[name],)
    }


def _check_inputs(
    params: dict[str, Any], x_TD: Tensor, positions: Tensor, segments: Segments | None, cfg: DecoderConfig
) -> None:
    if x_TD.ndim != 2 or x_TD.shape[1] != cfg.d_model:
        raise ValueError(
            f"decoder: needs tokens [T] or embeddings [T, {cfg.d_model}], got embeddings {list(x_TD.shape)}; "
            "fold a batch of sequences into one list of tokens and tell them apart by segments"
        )
    tokens = x_TD.shape[0]
    if positions.shape[-1] != tokens or positions.ndim > 2:
        raise ValueError(f"decoder: positions {list(positions.shape)} do not fit {tokens} tokens")
    if segments is not None and ids_of(segments).shape != (tokens,):
        raise ValueError(f"decoder: segments {list(ids_of(segments).shape)} do not fit {tokens} tokens")
    if len(params["layers"]) != cfg.layers:
        raise ValueError(f"decoder: params hold {len(params['layers'])} layers, the configuration says {cfg.layers}")
