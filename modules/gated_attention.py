"""Attention whose output each query head gates: sigmoids of the token, made beside its queries (Qwen3-Next).

Queries and keys of each head are normed by centred RMS norms, and a part of their dims is rotated.

Legend: T tokens, D model width, H query heads, G key/value heads, K head dim.
"""

from typing import Any

from torch import Tensor

from ftrain.kernels.rms_norm import rms_norm
from ftrain.kernels.rope import rope as rotate
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.spec import ParamSpec, Tree, fan_in, zeros


def gated_attention_block(cfg: AttentionConfig) -> Block:
    """`w_q_DHK` (`[D, 2 H K]`, for each head queries and gates), `w_k_DGK`, `w_v_DGK`, `w_o_HKD`, `q_offset_K`,
    `k_offset_K`. Biases and sinks of `cfg` are not read.

    >>> cfg = AttentionConfig(8, heads=2, kv_heads=1, head_dim=4)
    >>> gated_attention_block(cfg).specs(1.0)["w_q_DHK"].shape
    (8, 16)
    """

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        table = at.rope(cfg)
        assert table is not None
        q_THK, gate_THK = (x_TD @ params["w_q_DHK"]).unflatten(-1, (cfg.heads, -1)).chunk(2, -1)
        k_TGK, v_TGK = ((x_TD @ params[f"w_{n}_DGK"]).unflatten(-1, (cfg.kv_heads, -1)) for n in "kv")
        q_THK = rotate(rms_norm(q_THK, 1 + params["q_offset_K"], eps=cfg.norm_eps), *table)
        k_TGK = rotate(rms_norm(k_TGK, 1 + params["k_offset_K"], eps=cfg.norm_eps), *table)
        read_THK = at.attend(q_THK, k_TGK, v_TGK, window=cfg.window)
        return (read_THK * gate_THK.sigmoid()).flatten(1) @ params["w_o_HKD"]

    return Block(lambda out_gain: _specs(cfg, out_gain), apply)


def _specs(cfg: AttentionConfig, out_gain: float) -> Tree:
    d, hk, gk = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    return {
        "w_q_DHK": ParamSpec((d, 2 * hk), ("embed", "heads"), fan_in(d)),
        "w_k_DGK": ParamSpec((d, gk), ("embed", "kv_heads"), fan_in(d)),
        "w_v_DGK": ParamSpec((d, gk), ("embed", "kv_heads"), fan_in(d)),
        "w_o_HKD": ParamSpec((hk, d), ("heads", "embed"), fan_in(hk, gain=out_gain)),
        "q_offset_K": ParamSpec((cfg.head_dim,), ("head_dim",), zeros()),
        "k_offset_K": ParamSpec((cfg.head_dim,), ("head_dim",), zeros()),
    }
