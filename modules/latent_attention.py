"""Attention whose keys and values come from a small latent of each token, shared by all heads (MLA, DeepSeek-V2).

Queries may come through a latent too. Only a part of a head's dims is rotated, and of the keys that part is one for all
heads. Keys and values are made whole before attention, in training as in generation.

Legend: T tokens, D model width, H heads, K head dim of queries and keys (N not rotated and P rotated), V head dim of
values, Q and C widths of the latents of queries and of keys and values. Source: DeepSeek-AI, arXiv 2405.04434.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.rms_norm import rms_norm
from ftrain.kernels.rope import Llama3Scaling
from ftrain.kernels.rope import rope as rotate
from ftrain.kernels.yarn import YarnScaling
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.linear import affine
from ftrain.modules.spec import ParamSpec, Tree, fan_in, ones, zeros


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Shapes and positions of attention through latents.

    `q_rank` (None: queries come from the stream), `kv_rank`: Q and C. `plain_dim`, `rope_dim`, `v_dim`: N, P and V.
    `bias`: of the maps to the latents and of the output. `interleaved`: rotated dims are pairs of neighbours. `scale`:
    of the scores, `K ** -0.5` if None. `latent_eps`: of the norms of the latents.
    """

    d_model: int
    heads: int
    kv_rank: int
    plain_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    bias: bool = False
    interleaved: bool = True
    scale: float | None = None
    latent_eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_scaling: Llama3Scaling | YarnScaling | None = None

    @property
    def usual(self) -> AttentionConfig:
        """The heads and the positions as `DecoderConfig.attention` has them."""
        return AttentionConfig(
            self.d_model,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.plain_dim + self.rope_dim,
            rope_base=self.rope_base,
            rope_scaling=self.rope_scaling,
            rope_dim=self.rope_dim,
        )


def latent_attention_block(cfg: LatentAttentionConfig) -> Block:
    """`w_q_DHK`, or with `q_rank` `w_q_down_DQ`, `q_norm_Q`, `w_q_up_QHK`; `w_kv_down_DC` (`[D, C + P]`), `kv_norm_C`,
    `w_kv_up_CHK` (`[C, H * (N + V)]`), `w_o_HVD`; with `bias` `b_q_down_Q`, `b_kv_down_C`, `b_o_D`.

    >>> block = latent_attention_block(LatentAttentionConfig(8, 2, kv_rank=4, plain_dim=4, rope_dim=2, v_dim=3))
    >>> block.specs(1.0)["w_kv_up_CHK"].shape
    (4, 14)
    """

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        table = at.rope(cfg.usual)
        assert table is not None
        q_THK, k_THK, v_THV = _project(params, x_TD, cfg, *table)
        read_THV = at.attend(q_THK, k_THK, v_THV, scale=cfg.scale)
        return affine(read_THV.flatten(1), params["w_o_HVD"], params.get("b_o_D"))

    return Block(lambda out_gain: _specs(cfg, out_gain), apply)


def _specs(cfg: LatentAttentionConfig, out_gain: float) -> Tree:
    d, heads, wide = cfg.d_model, cfg.heads, cfg.kv_rank + cfg.rope_dim
    hk, hv, up = heads * (cfg.plain_dim + cfg.rope_dim), heads * cfg.v_dim, heads * (cfg.plain_dim + cfg.v_dim)
    tree = {
        "w_kv_down_DC": ParamSpec((d, wide), ("embed", "rank"), fan_in(d)),
        "kv_norm_C": ParamSpec((cfg.kv_rank,), ("rank",), ones()),
        "w_kv_up_CHK": ParamSpec((cfg.kv_rank, up), ("rank", "heads"), fan_in(cfg.kv_rank)),
        "w_o_HVD": ParamSpec((hv, d), ("heads", "embed"), fan_in(hv, gain=out_gain)),
    }
    if cfg.q_rank is None:
        tree["w_q_DHK"] = ParamSpec((d, hk), ("embed", "heads"), fan_in(d))
    else:
        tree["w_q_down_DQ"] = ParamSpec((d, cfg.q_rank), ("embed", "rank"), fan_in(d))
        tree["q_norm_Q"] = ParamSpec((cfg.q_rank,), ("rank",), ones())
        tree["w_q_up_QHK"] = ParamSpec((cfg.q_rank, hk), ("rank", "heads"), fan_in(cfg.q_rank))
    if cfg.bias:
        tree["b_kv_down_C"] = ParamSpec((wide,), ("rank",), zeros())
        tree["b_o_D"] = ParamSpec((d,), ("embed",), zeros())
        if cfg.q_rank is not None:
            tree["b_q_down_Q"] = ParamSpec((cfg.q_rank,), ("rank",), zeros())
    return tree


def _project(
    params: Any, x_TD: Tensor, cfg: LatentAttentionConfig, cos_TF: Tensor, sin_TF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys `[T, H, K]`, rotated, and values `[T, H, V]`."""
    layout = "interleaved" if cfg.interleaved else "half"
    q_THK = _queries(params, x_TD, cfg).unflatten(-1, (cfg.heads, -1))
    plain_THN, turned_THP = q_THK.split((cfg.plain_dim, cfg.rope_dim), -1)
    q_THK = torch.cat([plain_THN, rotate(turned_THP, cos_TF, sin_TF, layout=layout)], -1)
    down_TC = affine(x_TD, params["w_kv_down_DC"], params.get("b_kv_down_C"))
    latent_TC, turned_TP = down_TC.split((cfg.kv_rank, cfg.rope_dim), -1)
    latent_TC = rms_norm(latent_TC, params["kv_norm_C"], eps=cfg.latent_eps)
    both_THK = (latent_TC @ params["w_kv_up_CHK"]).unflatten(-1, (cfg.heads, -1))
    plain_THN, v_THV = both_THK.split((cfg.plain_dim, cfg.v_dim), -1)
    turned_T1P = rotate(turned_TP[:, None], cos_TF, sin_TF, layout=layout)
    k_THK = torch.cat([plain_THN, turned_T1P.expand(-1, cfg.heads, -1)], -1)
    return q_THK, k_THK, v_THV


def _queries(params: Any, x_TD: Tensor, cfg: LatentAttentionConfig) -> Tensor:
    if cfg.q_rank is None:
        return affine(x_TD, params["w_q_DHK"])
    latent_TQ = affine(x_TD, params["w_q_down_DQ"], params.get("b_q_down_Q"))
    return rms_norm(latent_TQ, params["q_norm_Q"], eps=cfg.latent_eps) @ params["w_q_up_QHK"]
