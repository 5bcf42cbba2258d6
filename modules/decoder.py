"""The decoder stack of the Llama and Qwen families: embedding, layers of attention and an MLP or experts, norm, head.

A layer is `x += attention(norm(x)); x += mlp(norm(x))`. Layers are a Python loop over a list: in a trace they are equal
regions, which a pass can find. The stack takes tokens or ready embeddings, so an omni model can put images among them.

Legend: T tokens, D model width, V vocabulary, E experts, L layers with experts, A position axes.
"""

import difflib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.mean import Mean
from kernels.pack import following, pack_index
from modules import attention, embedding, mlp, moe, norm
from modules.attention import AttentionConfig, RopeTable
from modules.mlp import MlpConfig
from modules.moe import MoEConfig, RouterStats
from modules.spec import Normal, ParamSpec, Tree

IGNORE = -100


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
    segments: Tensor | None,
    cfg: DecoderConfig,
    balance: Tree = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, DecoderStats]:
    """Tokens `[T]` (integers) or embeddings `[T, D]` (floats) to the hidden states after the last norm, `[T, D]`.

    `positions`: `[T]`, or `[A, T]` with several position axes, starting again in each document. `segments`: `[T]`
    int64 document ids, equal ids adjacent; `None` is one document. `balance`: the state of `balance_specs`, given
    exactly where the balance is "bias". `valid`: `[T]` bool, false for padding, which routers then do not count.
    """
    x_TD = x if x.is_floating_point() else embed(params, x)
    _check_inputs(params, x_TD, positions, segments, cfg)
    biases_LE = (balance or {}).get("router_bias_LE")
    rope = attention.rope(positions, cfg.attention)
    routers: list[RouterStats] = []
    for layer in params["layers"]:
        bias_E = None if biases_LE is None or "moe" not in layer else biases_LE[len(routers)]
        x_TD, router = apply_layer(layer, x_TD, cfg=cfg, segments_T=segments, rope=rope, bias_E=bias_E, valid_T=valid)
        if router is not None:
            routers.append(router)
    stacked = RouterStats(*(torch.stack(sums) for sums in zip(*routers, strict=True))) if routers else None
    return norm.apply(params["norm"], x_TD, eps=cfg.norm_eps), DecoderStats(stacked)


def apply_layer(
    params: dict[str, Any],
    x_TD: Tensor,
    *,
    cfg: DecoderConfig,
    segments_T: Tensor | None,
    rope: RopeTable | None,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, RouterStats | None]:
    """One layer, `[T, D]` to `[T, D]`, and its router's statistics where it has experts."""
    normed_TD = norm.apply(params["attention_norm"], x_TD, eps=cfg.norm_eps)
    x_TD = x_TD + attention.apply(params["attention"], normed_TD, cfg=cfg.attention, segments_T=segments_T, rope=rope)
    normed_TD = norm.apply(params["mlp_norm"], x_TD, eps=cfg.norm_eps)
    if "moe" not in params:
        return x_TD + mlp.apply(params["mlp"], normed_TD, cfg=cfg.mlp), None
    assert cfg.moe is not None
    out_TD, router = moe.apply(params["moe"], normed_TD, cfg=cfg.moe, bias_E=bias_E, valid_T=valid_T)
    return x_TD + out_TD, router


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
    labelled_T = (labels_T != IGNORE).to(torch.float32)
    return Mean(total, (labelled_T if weights_T is None else labelled_T * weights_T).sum())


def next_token_labels(tokens_T: Tensor, segments_T: Tensor | None) -> Tensor:
    """The label of each token is the token after it; -100 for the last of each document."""
    place_T = pack_index(tokens_T.shape[0], tokens_T.device)
    last_T = following(place_T) != place_T + 1
    if segments_T is not None:
        last_T = last_T | (following(segments_T) != segments_T)
    return following(tokens_T).masked_fill(last_T, IGNORE)


def update_balance(balance: Tree, stats: DecoderStats, *, rate: float) -> Tree:
    """The state of loss-free balancing after a step with these statistics (see `moe.update_bias`)."""
    if stats.router is None:
        return balance
    return {name: moe.update_bias(bias_LE, stats.router.load_E, rate=rate) for name, bias_LE in balance.items()}


def _check_inputs(
    params: dict[str, Any], x_TD: Tensor, positions: Tensor, segments: Tensor | None, cfg: DecoderConfig
) -> None:
    if x_TD.ndim != 2 or x_TD.shape[1] != cfg.d_model:
        raise ValueError(
            f"decoder: needs tokens [T] or embeddings [T, {cfg.d_model}], got embeddings {list(x_TD.shape)}; "
            "fold a batch of sequences into one list of tokens and tell them apart by segments"
        )
    tokens = x_TD.shape[0]
    if positions.shape[-1] != tokens or positions.ndim > 2:
        raise ValueError(f"decoder: positions {list(positions.shape)} do not fit {tokens} tokens")
    if segments is not None and segments.shape != (tokens,):
        raise ValueError(f"decoder: segments {list(segments.shape)} do not fit {tokens} tokens")
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
