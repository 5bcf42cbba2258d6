"""The attention block: projections, optional norms of queries and keys, rotary positions, attention over documents.

Legend: T tokens, D model width, H query heads, G key/value heads, K head dim.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Segments
from ftrain.kernels.rms_norm import rms_norm
from ftrain.kernels.rope import Llama3Scaling, rope_table
from ftrain.kernels.rope import rope as rotate
from ftrain.kernels.yarn import YarnScaling
from ftrain.modules.linear import affine
from ftrain.modules.spec import Normal, ParamSpec, fan_in, ones, zeros

RopeTable = tuple[Tensor, Tensor]  # (cos_TF, sin_TF)


@dataclass(frozen=True)
class AttentionConfig:
    """Shapes and positions of an attention block.

    `heads` query heads share `kv_heads` key/value heads (GQA, Ainslie et al. 2023), each `head_dim` wide. `qk_norm`:
    RMS norm of each head's queries and keys before rotation (Qwen3), with `norm_eps`. `bias`: of queries, keys and
    values, of keys only with `key_bias` too (Whisper has none); `out_bias`: of the output. `causal` and `window`
    (tokens a query sees, itself included; `None`: all) are the mask within a document. `rope_base` `None` means no
    rotation; `rope_sections` splits the rotated frequencies among several position axes (M-RoPE), in blocks or, with
    `rope_interleaved`, in turns; with `rope_per_axis_ladder` each axis has the whole range of frequencies (vision).
    `rope_scaling` stretches them for long texts (Llama 3.1, YaRN). `rope_dim`: only so many dims of a head are rotated,
    the first ones (`None`: all). `sinks`: each query head has a learned score that takes its part of the softmax
    (gpt-oss).

    Raises:
        ValueError: `heads` is no multiple of `kv_heads`, or rotary positions are given an odd number of dims, or more
            than a head has.
    """

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = False
    norm_eps: float = 1e-6
    bias: bool = False
    key_bias: bool = True
    out_bias: bool = False
    causal: bool = True
    window: int | None = None
    rope_base: float | None = 10_000.0
    rope_sections: tuple[int, ...] | None = None
    rope_interleaved: bool = False
    rope_per_axis_ladder: bool = False
    rope_scaling: Llama3Scaling | YarnScaling | None = None
    rope_dim: int | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"AttentionConfig: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.rope_base is not None and self.rotated % 2:
            raise ValueError(f"AttentionConfig: rotary positions need an even head_dim, got {self.rotated}")
        if not 0 < self.rotated <= self.head_dim:
            raise ValueError(f"AttentionConfig: rope_dim={self.rope_dim} of a head of {self.head_dim} dims")

    @property
    def rotated(self) -> int:
        """How many dims of a head are rotated."""
        return self.head_dim if self.rope_dim is None else self.rope_dim


def specs(cfg: AttentionConfig, *, out_gain: float = 1.0) -> dict[str, ParamSpec]:
    """`w_q_DHK [D, H*K]`, `w_k_DGK`, `w_v_DGK`, `w_o_HKD`; as configured `b_q_HK`, `b_k_GK`, `b_v_GK`, `b_o_D`, norms,
    `sinks_H`.

    `out_gain` scales the initial deviation of `w_o_HKD`, for deep residual stacks.

    >>> cfg = AttentionConfig(64, heads=4, kv_heads=2, head_dim=16)
    >>> {name: spec.shape for name, spec in specs(cfg).items()}
    {'w_q_DHK': (64, 64), 'w_k_DGK': (64, 32), 'w_v_DGK': (64, 32), 'w_o_HKD': (64, 64)}
    """
    d, hk, gk = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    tree = {
        "w_q_DHK": ParamSpec((d, hk), ("embed", "heads"), fan_in(d)),
        "w_k_DGK": ParamSpec((d, gk), ("embed", "kv_heads"), fan_in(d)),
        "w_v_DGK": ParamSpec((d, gk), ("embed", "kv_heads"), fan_in(d)),
        "w_o_HKD": ParamSpec((hk, d), ("heads", "embed"), fan_in(hk, gain=out_gain)),
    }
    if cfg.bias:
        tree["b_q_HK"] = ParamSpec((hk,), ("heads",), zeros())
        if cfg.key_bias:
            tree["b_k_GK"] = ParamSpec((gk,), ("kv_heads",), zeros())
        tree["b_v_GK"] = ParamSpec((gk,), ("kv_heads",), zeros())
    if cfg.out_bias:
        tree["b_o_D"] = ParamSpec((d,), ("embed",), zeros())
    if cfg.qk_norm:
        tree["q_norm_K"] = ParamSpec((cfg.head_dim,), ("head_dim",), ones())
        tree["k_norm_K"] = ParamSpec((cfg.head_dim,), ("head_dim",), ones())
    if cfg.sinks:
        tree["sinks_H"] = ParamSpec((cfg.heads,), ("heads",), Normal(0.02))
    return tree


def rope(positions: Tensor, cfg: AttentionConfig) -> RopeTable | None:
    """Cosines and sines of positions `[T]` or `[A, T]` (A position axes), once per stack; `None` without rotation."""
    if cfg.rope_base is None:
        return None
    return rope_table(
        positions,
        head_dim=cfg.rotated,
        base=cfg.rope_base,
        sections=cfg.rope_sections,
        interleaved=cfg.rope_interleaved,
        per_axis_ladder=cfg.rope_per_axis_ladder,
        scaling=cfg.rope_scaling,
    )


def rotation(cfg: AttentionConfig) -> tuple[Any, ...]:
    """What `rope` reads of a configuration: where it is equal, tables are."""
    sections = (cfg.rope_sections, cfg.rope_interleaved, cfg.rope_per_axis_ladder)
    return (cfg.rotated, cfg.rope_base, *sections, cfg.rope_scaling)


def apply(
    params: dict[str, Any], x_TD: Tensor, *, cfg: AttentionConfig, segments_T: Segments | None, rope: RopeTable | None
) -> Tensor:
    """`[T, D]` to `[T, D]`, every token attending within its document.

    `segments_T`: int64 document ids, equal ids adjacent, or `Documents`; `None` is one document. `rope`: from
    `rope(positions, cfg)`.

    >>> import torch
    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = AttentionConfig(64, heads=4, kv_heads=2, head_dim=16)
    >>> params, positions_T = spec.init(specs(cfg), random.key(0)), torch.arange(5)
    >>> table = rope(positions_T, cfg)
    >>> list(apply(params, torch.ones(5, 64), cfg=cfg, segments_T=None, rope=table).shape)
    [5, 64]
    """
    q_THK, k_TGK, v_TGK = project(params, x_TD, cfg, rope)
    return output(params, within_documents(q_THK, k_TGK, v_TGK, cfg, segments_T, sinks_H=params.get("sinks_H")))


def project(
    params: dict[str, Any], x_TD: Tensor, cfg: AttentionConfig, rope: RopeTable | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[T, H, K]`, keys and values `[T, G, K]` of tokens `[T, D]`: normed and rotated as configured.

    ValueError if a rope table is given to a block without rotation, or none to a block with it.
    """
    if (rope is None) != (cfg.rope_base is None):
        given = "no rope table was" if rope is None else "a rope table was"
        raise ValueError(f"attention: rope_base={cfg.rope_base}, but {given} given")
    q_THK = affine(x_TD, params["w_q_DHK"], params.get("b_q_HK")).unflatten(-1, (cfg.heads, cfg.head_dim))
    k_TGK = affine(x_TD, params["w_k_DGK"], params.get("b_k_GK")).unflatten(-1, (cfg.kv_heads, cfg.head_dim))
    v_TGK = affine(x_TD, params["w_v_DGK"], params.get("b_v_GK")).unflatten(-1, (cfg.kv_heads, cfg.head_dim))
    if cfg.qk_norm:
        q_THK = rms_norm(q_THK, params["q_norm_K"], eps=cfg.norm_eps)
        k_TGK = rms_norm(k_TGK, params["k_norm_K"], eps=cfg.norm_eps)
    if rope is not None:
        q_THK, k_TGK = rotate(q_THK, *rope), rotate(k_TGK, *rope)
    return q_THK, k_TGK, v_TGK


def within_documents(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cfg: AttentionConfig,
    segments_T: Segments | None,
    *,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """What each token reads from its document under the mask of `cfg`, `[T, H, K]`; `sinks_H` as in `attention`."""
    return attention(q_THK, k_TGK, v_TGK, segments_T=segments_T, causal=cfg.causal, window=cfg.window, sinks_H=sinks_H)


def output(params: dict[str, Any], out_THK: Tensor) -> Tensor:
    """What the heads have read, `[T, H, K]`, back to `[T, D]`."""
    return affine(out_THK.flatten(1), params["w_o_HKD"], params.get("b_o_D"))
