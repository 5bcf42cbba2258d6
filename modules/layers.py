"""The blocks that stacks have by themselves, as `Block`s: attention, MLP, experts, and the pre-norm residual layer.

Legend: T tokens, D model width, H query heads, G key/value heads, K head dim.
"""

from typing import Any

from torch import Tensor

from ftrain.modules import attention, mlp, moe, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.moe import MoEConfig


def attention_block(cfg: AttentionConfig) -> Block:
    """The attention of `ftrain.modules.attention`: its parameters, and keys and values in the cache.

    >>> sorted(attention_block(AttentionConfig(8, heads=2, kv_heads=1, head_dim=4)).specs(1.0))
    ['w_k_DGK', 'w_o_HKD', 'w_q_DHK', 'w_v_DGK']
    """

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        q_THK, k_TGK, v_TGK = attention.project(params, x_TD, cfg, at.rope(cfg))
        sinks_H = params.get("sinks_H")
        read_THK = at.attend(q_THK, k_TGK, v_TGK, causal=cfg.causal, window=cfg.window, sinks_H=sinks_H)
        return attention.output(params, read_THK)

    return Block(lambda out_gain: attention.specs(cfg, out_gain=out_gain), apply)


def mlp_block(cfg: MlpConfig) -> Block:
    """The MLP of `ftrain.modules.mlp`.

    >>> sorted(mlp_block(MlpConfig(8, 16)).specs(1.0))
    ['w_down_FD', 'w_gate_DF', 'w_up_DF']
    """
    return Block(
        lambda out_gain: mlp.specs(cfg, out_gain=out_gain), lambda params, x_TD, at: mlp.apply(params, x_TD, cfg=cfg)
    )


def moe_block(cfg: MoEConfig) -> Block:
    """The experts of `ftrain.modules.moe`; what their router does is recorded in the context.

    >>> moe_block(MoEConfig(8, 4, experts=4, top_k=2)).routers[0].experts
    4
    """

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        out_TD, stats = moe.apply(params, x_TD, cfg=cfg, bias_E=at.bias_E(), valid_T=at.valid_T)
        at.record(stats)
        return out_TD

    return Block(lambda out_gain: moe.specs(cfg, out_gain=out_gain), apply, routers=(cfg,))


def residual_layer(
    d_model: int,
    *,
    attention: Block,
    mlp: Block,
    eps: float = 1e-6,
    kind: norm.Kind = "rms",
    norms: tuple[str, str] = ("attention_norm", "mlp_norm"),
) -> Block:
    """`x += attention(norm(x)); x += mlp(norm(x))` with norms of `eps`: with RMS norms the layer of Llama and Qwen.

    Its parameters are those of the two norms, by the names `norms`, `attention`, and `mlp`, which is called `moe` where
    it has a router of ours. Either block may be one of your own. `kind`: of the norms.

    >>> mlp, heads = MlpConfig(8, 16), AttentionConfig(8, heads=2, kv_heads=1, head_dim=4)
    >>> sorted(residual_layer(8, attention=attention_block(heads), mlp=mlp_block(mlp)).specs(1.0))
    ['attention', 'attention_norm', 'mlp', 'mlp_norm']
    """
    second = "moe" if mlp.routers else "mlp"

    def specs(out_gain: float) -> dict[str, Any]:
        return {
            norms[0]: norm.specs(d_model, kind=kind),
            "attention": attention.specs(out_gain),
            norms[1]: norm.specs(d_model, kind=kind),
            second: mlp.specs(out_gain),
        }

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        x_TD = x_TD + at.run(attention, params["attention"], normed(params[norms[0]], x_TD, at))
        return x_TD + at.run(mlp, params[second], normed(params[norms[1]], x_TD, at))

    def normed(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        with at.cheaply():
            return norm.apply(params, x_TD, eps=eps)

    return Block(specs, apply, routers=(*attention.routers, *mlp.routers))
