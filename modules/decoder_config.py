"""What a decoder is made of: its configuration, the block that each of its layers is, and configurations by name.

A layer is `x += attention(norm(x)); x += mlp(norm(x))` (modules/layers.py) unless `DecoderConfig.pattern` has another.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from ftrain.modules import norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, in_turn
from ftrain.modules.layers import attention_block, mlp_block, moe_block, residual_layer
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.moe import MoEConfig


@dataclass(frozen=True)
class DecoderConfig:
    """A stack of `layers` layers over `vocab` tokens.

    Layers have an MLP of hidden width `d_hidden`, or with `moe` experts, but for the first `dense_layers`. With
    `tie_embeddings` the head is the token table. `norm_kind`: of the norms of layers and the last (`modules/norm.py`);
    `init_std` is the initial deviation of the table and the head.

    `mtp`: the layer of each module of multi-token prediction (`ftrain.modules.multi_token`), none for most;
    `mtp_weight`: of the mean of their losses, beside that of the next token.

    `pattern`: layers of your own, in turn: layer i is `pattern[i % len(pattern)]`, where None is the layer that the
    other fields describe. `layer_with` makes one of those with another MLP or attention in it.

    ValueError where a size is below 1, widths differ, an MLP has no `d_hidden`, or routers of different layers differ
    in their number of experts or their balance (statistics and biases are stacked over layers).

    >>> from dataclasses import replace
    >>> base = preset("llama-tiny")
    >>> own = layer_with(base, mlp=mlp_block(MlpConfig(64, 48, kind="gelu")))
    >>> mixed = replace(base, layers=8, pattern=(None, None, None, own))  # every fourth layer another
    >>> [mixed.own(i) is not None for i in range(4)]
    [False, False, False, True]
    """

    vocab: int
    d_model: int
    layers: int
    attention: AttentionConfig
    d_hidden: int = 0
    moe: MoEConfig | None = None
    dense_layers: int = 0
    norm_eps: float = 1e-6
    norm_kind: norm.Kind = "rms"
    tie_embeddings: bool = False
    init_std: float = 0.02
    pattern: tuple[Block | None, ...] = ()
    mtp: tuple[Block, ...] = ()
    mtp_weight: float = 0.1

    def __post_init__(self) -> None:
        if min(self.vocab, self.d_model, self.layers) < 1:
            sizes = f"vocab={self.vocab}, d_model={self.d_model} and layers={self.layers}"
            raise ValueError(f"DecoderConfig: {sizes} must be at least 1")
        for name, part in (("attention", self.attention), ("moe", self.moe)):
            if part is not None and part.d_model != self.d_model:
                raise ValueError(f"DecoderConfig: {name}.d_model={part.d_model} differs from d_model={self.d_model}")
        if self.d_hidden < 1 and any(not self.own(i) and not self.has_experts(i) for i in range(self.layers)):
            raise ValueError("DecoderConfig: a layer without experts needs d_hidden, the hidden width of its MLP")
        kinds = {(router.experts, router.balance) for router in (*self.routers, *self.mtp_routers)}
        if len(kinds) > 1:
            raise ValueError(
                f"DecoderConfig: routers of (experts, balance) {' and '.join(map(str, sorted(kinds)))} in one stack: "
                "their statistics are stacked over layers, so give all the same of both"
            )

    def own(self, layer: int) -> Block | None:
        """The block of `pattern` that layer number `layer` is; None for one that the other fields describe."""
        return in_turn(self.pattern, layer)

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer`, of those that `pattern` leaves as they are, has experts and no MLP."""
        return self.moe is not None and layer >= self.dense_layers and self.own(layer) is None

    @property
    def routers(self) -> tuple[MoEConfig, ...]:
        """The routers of all layers, in their order."""
        return tuple(router for i in range(self.layers) for router in layer_block(self, i).routers)

    @property
    def mtp_routers(self) -> tuple[MoEConfig, ...]:
        """The routers of the modules of multi-token prediction, in their order."""
        return tuple(router for block in self.mtp for router in block.routers)

    @property
    def balance(self) -> Literal["aux", "bias", "none"]:
        """How the load of the routers is kept even, see `MoEConfig`; "none" without a router."""
        routers = (*self.routers, *self.mtp_routers)
        return routers[0].balance if routers else "none"

    @property
    def mlp(self) -> MlpConfig:
        """The MLP of the layers without experts."""
        return MlpConfig(self.d_model, self.d_hidden)


def layer_block(cfg: DecoderConfig, layer: int) -> Block:
    """The block that layer number `layer` is: that of `pattern`, or the built-in one."""
    own = cfg.own(layer)
    if own is not None:
        return own
    return layer_with(cfg, mlp=moe_block(cfg.moe) if cfg.moe and cfg.has_experts(layer) else mlp_block(cfg.mlp))


def layer_with(cfg: DecoderConfig, *, attention: Block | None = None, mlp: Block | None = None) -> Block:
    """The layer of this configuration with another attention or another MLP, for `DecoderConfig.pattern`.

    What is not given is the configuration's: its attention, and its experts, or its MLP where it has none.
    """
    usual = moe_block(cfg.moe) if cfg.moe is not None else mlp_block(cfg.mlp)
    return residual_layer(
        cfg.d_model,
        attention=attention or attention_block(cfg.attention),
        mlp=mlp or usual,
        eps=cfg.norm_eps,
        kind=cfg.norm_kind,
    )


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
    """A configuration by name: "llama-tiny", "qwen3-moe-tiny", or "30b-a3b" (Qwen3-30B-A3B, Qwen team 2025).

    ValueError for another name, which tells the nearest.

    >>> preset("30b-a3b").layers
    48
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no decoder is called {name!r}; nearest: {near!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def used_experts(cfg: DecoderConfig) -> int:
    """How many experts a token uses in each layer that has them; 0 without."""
    return max((router.top_k for router in cfg.routers), default=0)
