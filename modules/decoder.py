"""The decoder stack of the Llama and Qwen families: embedding, layers of attention and an MLP or experts, norm, head.

A layer is `x += attention(norm(x)); x += mlp(norm(x))`. Layers are a Python loop over a list: in a trace they are equal
regions, which a pass can find. The stack takes tokens or ready embeddings, so an omni model can put images among them.

For generation `prefill` runs whole prompts and keeps their keys and values, and `extend` runs one more token of each:
the same layers, whose queries then read from the cache (modules/kv_cache.py).

Legend: T tokens, B sequences, D model width, V vocabulary, E experts, L layers with experts, A position axes, H query
heads, G key/value heads, K head dim, S places of a cache.
"""

import difflib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.backend import reference_kernels
from ftrain.kernels.chunks import PIECE
from ftrain.kernels.documents import Segments, ids_of
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import following, pack_index
from ftrain.modules import attention, embedding, kv_cache, mlp, moe, norm
from ftrain.modules.attention import AttentionConfig, RopeTable
from ftrain.modules.kv_cache import KvCache, LayerCache
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.moe import MoEConfig, RouterStats
from ftrain.modules.spec import Normal, ParamSpec, Tree

IGNORE = -100

Mix = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]
"""Queries, keys and values of one layer to what the queries read, `[T, H, K]`, and what is kept of the layer."""


@dataclass(frozen=True)
class DecoderConfig:
    """A stack of `layers` layers over `vocab` tokens.

    Layers have an MLP of hidden width `d_hidden`, or with `moe` experts, but for the first `dense_layers`. With
    `tie_embeddings` the head is the token table. `init_std` is the initial deviation of the table and the head.
    """

    vocab: int
    d_model: int
    layers: int
    attention: AttentionConfig
    d_hidden: int = 0
    moe: MoEConfig | None = None
    dense_layers: int = 0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name, part in (("attention", self.attention), ("moe", self.moe)):
            if part is not None and part.d_model != self.d_model:
                raise ValueError(f"DecoderConfig: {name}.d_model={part.d_model} differs from d_model={self.d_model}")
        if self.d_hidden < 1 and any(not self.has_experts(i) for i in range(self.layers)):
            raise ValueError("DecoderConfig: a layer without experts needs d_hidden, the hidden width of its MLP")

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` has experts in the place of an MLP."""
        return self.moe is not None and layer >= self.dense_layers

    @property
    def mlp(self) -> MlpConfig:
        """The MLP of the layers without experts."""
        return MlpConfig(self.d_model, self.d_hidden)


class DecoderStats(NamedTuple):
    """What a pass through the stack tells besides its output.

    `router`: `load_E` and `probability_E` `[L, E]` and `count` `[L]`, stacked over the layers with experts; or `None`.
    """

    router: RouterStats | None


def specs(cfg: DecoderConfig) -> dict[str, Any]:
    """`embedding`, `layers` (a list), `norm`, and `head.w_DV` unless the embeddings are tied.

    The last weight of each residual branch starts smaller by `1 / sqrt(2 * layers)` (Radford et al. 2019), so that the
    residual stream's variance does not grow with depth.
    """
    tree: dict[str, Any] = {
        "embedding": embedding.specs(cfg.vocab, cfg.d_model, init=Normal(cfg.init_std)),
        "layers": [_layer_specs(cfg, i) for i in range(cfg.layers)],
        "norm": norm.specs(cfg.d_model),
    }
    if not cfg.tie_embeddings:
        tree["head"] = {"w_DV": ParamSpec((cfg.d_model, cfg.vocab), ("embed", "vocab"), Normal(cfg.init_std))}
    return tree


def _layer_specs(cfg: DecoderConfig, layer: int) -> dict[str, Any]:
    gain = (2 * cfg.layers) ** -0.5
    tree: dict[str, Any] = {
        "attention_norm": norm.specs(cfg.d_model),
        "attention": attention.specs(cfg.attention, out_gain=gain),
        "mlp_norm": norm.specs(cfg.d_model),
    }
    if cfg.moe is not None and cfg.has_experts(layer):
        tree["moe"] = moe.specs(cfg.moe, out_gain=gain)
    else:
        tree["mlp"] = mlp.specs(cfg.mlp, out_gain=gain)
    return tree


def balance_specs(cfg: DecoderConfig) -> dict[str, Any]:
    """The state of loss-free balancing: `router_bias_LE`, one row per layer with experts; empty for other balances."""
    if cfg.moe is None or cfg.moe.balance != "bias":
        return {}
    rows = sum(cfg.has_experts(i) for i in range(cfg.layers))
    one = moe.balance_specs(cfg.moe)["router_bias_E"]
    return {"router_bias_LE": ParamSpec((rows, *one.shape), ("layers", *one.axes), one.init)} if rows else {}


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
) -> tuple[Tensor, DecoderStats]:
    """Tokens `[T]` (integers) or embeddings `[T, D]` (floats) to the hidden states after the last norm, `[T, D]`.

    `positions`: `[T]`, or `[A, T]` with several position axes, starting again in each document. `segments`: `[T]`
    int64 document ids, equal ids adjacent, or `Documents`, with which a CUDA device never waits; `None` is one
    document. `balance`: the state of `balance_specs`, given
    exactly where the balance is "bias". `valid`: `[T]` bool, false for padding, which routers then do not count.
    """
    x_TD = x if x.is_floating_point() else embed(params, x)
    _check_inputs(params, x_TD, positions, segments, cfg)
    mixes = [_within(cfg, segments)] * cfg.layers
    x_TD, _, routers = _stack(params, x_TD, mixes, cfg=cfg, positions=positions, balance=balance, valid_T=valid)
    stacked = RouterStats(*(torch.stack(sums) for sums in zip(*routers, strict=True))) if routers else None
    return _last_norm(params, x_TD, cfg), DecoderStats(stacked)


def prefill(
    params: dict[str, Any],
    x_TD: Tensor,
    *,
    positions: Tensor,
    length_B: Tensor,
    room: int,
    cfg: DecoderConfig,
    balance: Tree = None,
) -> tuple[Tensor, KvCache]:
    """Hidden states `[T, D]` of B packed sequences, as of `apply`, and the cache from which `extend` goes on.

    `length_B`: int64, how many tokens each sequence has, in the order of the pack; one may have none, which segments
    could not say. `room`: how many tokens each will be extended by at most. `positions`, `balance`: as in `apply`.
    ValueError if there is no token at all.
    """
    _check_causal(cfg)
    if not len(x_TD):
        raise ValueError(f"decoder: {len(length_B)} sequences without a token: at least one of them must have begun")
    segments_T = torch.repeat_interleave(length_B)
    _check_inputs(params, x_TD, positions, segments_T, cfg)
    mixes = [_within(cfg, segments_T, keep=True)] * cfg.layers
    x_TD, kept, _ = _stack(params, x_TD, mixes, cfg=cfg, positions=positions, balance=balance)
    return _last_norm(params, x_TD, cfg), kv_cache.from_packed(kept, length_B, room=room)


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

    `positions`: those of the new tokens, `[B]` or `[A, B]`. ValueError where the cache has no room left, or another
    number of sequences.
    """
    _check_causal(cfg)
    _check_inputs(params, x_BD, positions, None, cfg)
    if len(x_BD) != len(cache.length_B):
        raise ValueError(
            f"decoder: {len(x_BD)} new tokens for a cache of {len(cache.length_B)} sequences: give one each"
        )
    if cache.room < 1:
        raise ValueError(f"decoder: the cache of {len(x_BD)} sequences is full: give prefill a larger room")
    grown = cache._replace(length_B=cache.length_B + 1, room=cache.room - 1)
    seen_BS = kv_cache.seen(grown, window=cfg.attention.window)
    mixes = [_from_cache(layer, cache.length_B, seen_BS) for layer in cache.layers]
    few = x_BD.numel() <= PIECE
    x_BD, layers, _ = _stack(params, x_BD, mixes, cfg=cfg, positions=positions, balance=balance, few=few)
    return _last_norm(params, x_BD, cfg), grown._replace(layers=tuple(layers))


def apply_layer(
    params: dict[str, Any],
    x_TD: Tensor,
    *,
    cfg: DecoderConfig,
    segments_T: Segments | None,
    rope: RopeTable | None,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, RouterStats | None]:
    """One layer, `[T, D]` to `[T, D]`, and its router's statistics where it has experts."""
    mix = _within(cfg, segments_T)
    x_TD, _, router = _layer(params, x_TD, mix, cfg=cfg, rope=rope, bias_E=bias_E, valid_T=valid_T)
    return x_TD, router


def _within(cfg: DecoderConfig, segments_T: Segments | None, *, keep: bool = False) -> Mix:
    """Every token reads from its document; with `keep` its keys and values are kept."""

    def mix(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Any]:
        out_THK = attention.within_documents(q_THK, k_TGK, v_TGK, cfg.attention, segments_T)
        return out_THK, (k_TGK, v_TGK) if keep else None

    return mix


def _from_cache(layer: LayerCache, length_B: Tensor, seen_BS: Tensor) -> Mix:
    """One token per sequence is appended to what `length_B` tokens left, and reads what it sees; the layer is kept."""

    def mix(q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> tuple[Tensor, LayerCache]:
        longer = kv_cache.append(layer, k_BGK, v_BGK, length_B)
        return kv_cache.attend(q_BHK, longer, seen_BS), longer

    return mix


def _stack(
    params: dict[str, Any],
    x_TD: Tensor,
    mixes: Sequence[Mix],
    *,
    cfg: DecoderConfig,
    positions: Tensor,
    balance: Tree,
    valid_T: Tensor | None = None,
    few: bool = False,
) -> tuple[Tensor, list[Any], list[RouterStats]]:
    """All layers, one of `mixes` each; what each of them kept; the statistics of those with experts.

    `few`: the tokens are so few that a fast kernel's call costs more than its work: all but experts, which in plain
    torch would each compute every token, runs on reference kernels.
    """
    biases_LE = (balance or {}).get("router_bias_LE")
    rope = attention.rope(positions, cfg.attention)
    kept, routers = [], list[RouterStats]()
    for layer, mix in zip(params["layers"], mixes, strict=True):
        bias_E = None if biases_LE is None or "moe" not in layer else biases_LE[len(routers)]
        x_TD, keep, router = _layer(layer, x_TD, mix, cfg=cfg, rope=rope, bias_E=bias_E, valid_T=valid_T, few=few)
        kept.append(keep)
        if router is not None:
            routers.append(router)
    return x_TD, kept, routers


def _last_norm(params: dict[str, Any], x_TD: Tensor, cfg: DecoderConfig) -> Tensor:
    return norm.apply(params["norm"], x_TD, eps=cfg.norm_eps)


def _layer(
    params: dict[str, Any],
    x_TD: Tensor,
    mix: Mix,
    *,
    cfg: DecoderConfig,
    rope: RopeTable | None,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    few: bool = False,
) -> tuple[Tensor, Any, RouterStats | None]:
    """The formula of a layer, whatever its queries read from; `few` as in `_stack`."""
    with reference_kernels() if few else nullcontext():
        normed_TD = norm.apply(params["attention_norm"], x_TD, eps=cfg.norm_eps)
        out_THK, keep = mix(*attention.project(params["attention"], normed_TD, cfg.attention, rope))
        x_TD = x_TD + attention.output(params["attention"], out_THK)
        normed_TD = norm.apply(params["mlp_norm"], x_TD, eps=cfg.norm_eps)
        if "moe" not in params:
            return x_TD + mlp.apply(params["mlp"], normed_TD, cfg=cfg.mlp), keep, None
    assert cfg.moe is not None
    out_TD, router = moe.apply(params["moe"], normed_TD, cfg=cfg.moe, bias_E=bias_E, valid_T=valid_T)
    return x_TD + out_TD, keep, router


def logits(params: dict[str, Any], hidden_TD: Tensor, cfg: DecoderConfig) -> Tensor:
    """Scores of every next token, `[T, V]`: for generation; a loss does not need them (see `loss`)."""
    return hidden_TD @ (params["embedding"]["table_VD"].T if cfg.tie_embeddings else params["head"]["w_DV"])


def loss(
    params: dict[str, Any], hidden_TD: Tensor, labels_T: Tensor, cfg: DecoderConfig, *, weights_T: Tensor | None = None
) -> Mean:
    """Cross entropy of each position's label, in nats, without holding `[T, V]` logits.

    `labels_T`: the *next* token of each position (see `next_token_labels`), -100 where there is none. `weights_T`: a
    constant weight per position; the mean is then over the sum of weights.
    """
    tied = cfg.tie_embeddings
    head = params["embedding"]["table_VD"] if tied else params["head"]["w_DV"]
    weights_T = None if weights_T is None else weights_T.detach()
    total = linear_cross_entropy(hidden_TD, head, labels_T, ignore_index=IGNORE, weights_T=weights_T, transposed=tied)
    labelled_T = labels_T != IGNORE
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    counted_T = labelled_T.to(wide) if weights_T is None else torch.where(labelled_T, weights_T.to(wide), 0)
    return Mean(total, counted_T.sum())


def next_token_labels(tokens_T: Tensor, segments_T: Segments | None) -> Tensor:
    """The label of each token is the token after it; -100 for the last of each document."""
    place_T = pack_index(tokens_T.shape[0], tokens_T.device)
    last_T = following(place_T) != place_T + 1
    if segments_T is not None:
        ids_T = ids_of(segments_T)
        last_T = last_T | (following(ids_T) != ids_T)
    return following(tokens_T).masked_fill(last_T, IGNORE)


def update_balance(balance: Tree, stats: DecoderStats, *, rate: float) -> Tree:
    """The state of loss-free balancing after a step with these statistics (see `moe.update_bias`)."""
    if stats.router is None:
        return balance
    return {name: moe.update_bias(bias_LE, stats.router.load_E, rate=rate) for name, bias_LE in balance.items()}


def _check_causal(cfg: DecoderConfig) -> None:
    if not cfg.attention.causal:
        raise ValueError("decoder: a cache needs causal attention, where a token changes nothing before it")


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


def _llama_tiny() -> DecoderConfig:
    heads = AttentionConfig(64, heads=4, kv_heads=2, head_dim=16)
    return DecoderConfig(vocab=256, d_model=64, layers=2, attention=heads, d_hidden=128)


def _qwen3_moe_tiny() -> DecoderConfig:
    heads = AttentionConfig(64, heads=4, kv_heads=2, head_dim=16, qk_norm=True)
    return DecoderConfig(vocab=256, d_model=64, layers=2, attention=heads, moe=MoEConfig(64, 32, experts=8, top_k=2))


def _qwen3_30b_a3b() -> DecoderConfig:
    heads = AttentionConfig(2048, heads=32, kv_heads=4, head_dim=128, qk_norm=True, rope_base=1e6)
    experts = MoEConfig(2048, 768, experts=128, top_k=8)
    return DecoderConfig(vocab=151_936, d_model=2048, layers=48, attention=heads, moe=experts)


PRESETS = {"llama-tiny": _llama_tiny, "qwen3-moe-tiny": _qwen3_moe_tiny, "30b-a3b": _qwen3_30b_a3b}


def preset(name: str) -> DecoderConfig:
    """A configuration by name: "llama-tiny", "qwen3-moe-tiny", or "30b-a3b" (Qwen3-30B-A3B)."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no decoder is called {name!r}; nearest: {near!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()
