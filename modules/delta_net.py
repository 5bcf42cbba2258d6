"""The gated delta net of Qwen3-Next and Qwen3.5: a short causal convolution, a memory by the gated delta rule, a gate.

A block with a memory of its own: documents of a pack stay apart. Where ranks share a pack and divide its key heads,
each works out its heads of all tokens.

Legend: T tokens, P tokens of the pack, B sequences, D model width, J key heads, H value heads (J times R), j and h of
them on a rank, K key dim, V value dim, C channels of the convolution (2 J K + H V), X taps, M = C + H V.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import document_index
from ftrain.kernels.gated_delta_rule import gated_delta_rule, gated_delta_step
from ftrain.kernels.pack import divide_heads, join_heads, own_heads
from ftrain.kernels.rms_norm import rms_norm
from ftrain.modules.block import Block, Cache, Context, Newest, Prompts
from ftrain.modules.spec import ParamSpec, Tree, Uniform, fan_in, ones


@dataclass(frozen=True)
class DeltaNetConfig:
    """Shapes: `key_heads`, `heads` of values (a multiple of them), `key_dim`, `value_dim`, `taps` of the convolution.

    `norm_eps`: of the norm of what is read. `apart`: queries, keys and values, gates, rates, and decays each have a
    matrix (Qwen3.5), in the place of two that go from key head to key head. ValueError for heads that are no multiple.
    """

    d_model: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    norm_eps: float = 1e-6
    apart: bool = False

    def __post_init__(self) -> None:
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"DeltaNetConfig: heads={self.heads} must be a multiple of key_heads={self.key_heads}")

    @property
    def parts(self) -> tuple[int, int, int]:
        """The channels of the convolution: queries, keys, values."""
        return self.key_heads * self.key_dim, self.key_heads * self.key_dim, self.heads * self.value_dim


class Memory(NamedTuple):
    """What is kept of each sequence: the last inputs of the convolution, and the memory."""

    tail_BXC: Tensor
    state_BHKV: Tensor


class _Inputs(NamedTuple):
    """What a token gives the memory: channels before the convolution, and what decay and rate are made of."""

    mixed_TC: Tensor
    decay_TH: Tensor
    rate_TH: Tensor


def delta_net_block(cfg: DeltaNetConfig) -> Block:
    """`w_in_DM` (for each key head query, key, values, gates), `w_rates_DH` (`[D, 2 H]`: for each key head rates and
    decays), `conv_C1X`, `decay_log_H`, `decay_bias_H`, `norm_V`, `w_o_HVD`. With `apart` `w_mixed_DC`, `w_gate_DV`
    (`[D, H V]`), `w_rate_DH` and `w_decay_DH` in the place of the first two.

    >>> cfg = DeltaNetConfig(8, key_heads=1, heads=2, key_dim=4, value_dim=3)
    >>> delta_net_block(cfg).specs(1.0)["w_in_DM"].shape
    (8, 20)
    """

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        given, gate_THV = _inputs(params, x_TD, cfg)
        if at.sharing(len(x_TD)) == 1:
            out_THV = _read(params, given, at.pack_ids(len(x_TD), x_TD.device), cfg)
        else:
            own, of_all, own_cfg = _divided(params, given, cfg)
            out_THV = join_heads(_read(own, of_all, at.pack_ids(len(x_TD), x_TD.device), own_cfg))
        return _output(params, out_THV, gate_THV, cfg)

    def prefill(params: Any, x_TD: Tensor, at: Prompts) -> tuple[Tensor, Memory]:
        (given, gate_THV), where = _inputs(params, x_TD, cfg), at.unpacking
        index_T = where.sequence_T
        q, k, v = (at.unpack(x) for x in _heads(_convolved(params, given.mixed_TC, index_T), cfg))
        # behind a sequence's end nothing decays and nothing is written
        decay, rate = (at.unpack(x[..., None])[..., 0] for x in _decays(params, given))
        out_BHLV, state_BHKV = gated_delta_rule(q, k, v, decay, rate)
        out_THV = out_BHLV[where.sequence_T, :, where.place_T]
        tail_BXC = _tails(at.unpack(given.mixed_TC[:, None])[:, 0], at.length_B, cfg.taps)
        return _output(params, out_THV, gate_THV, cfg), Memory(tail_BXC, state_BHKV)

    def extend(params: Any, x_BD: Tensor, state: Memory, at: Newest) -> tuple[Tensor, Memory]:
        given, gate_BHV = _inputs(params, x_BD, cfg)
        window_BXC = torch.cat([state.tail_BXC, given.mixed_TC[:, None]], 1)
        mixed_BC = F.silu(torch.einsum("bxc,cx->bc", window_BXC, params["conv_C1X"][:, 0]))
        q, k, v = _heads(mixed_BC, cfg)
        out_BHV, state_BHKV = gated_delta_step(q, k, v, *_decays(params, given), state.state_BHKV)
        return _output(params, out_BHV, gate_BHV, cfg), Memory(window_BXC[:, 1:], state_BHKV)

    return Block(lambda out_gain: _specs(cfg, out_gain), apply, Cache(prefill, extend), heads=cfg.key_heads)


def _specs(cfg: DeltaNetConfig, out_gain: float) -> Tree:
    d, channels, wide = cfg.d_model, sum(cfg.parts), cfg.heads * cfg.value_dim
    together = {"w_in_DM": channels + wide, "w_rates_DH": 2 * cfg.heads}
    apart = {"w_mixed_DC": channels, "w_gate_DV": wide, "w_rate_DH": cfg.heads, "w_decay_DH": cfg.heads}
    maps = apart if cfg.apart else together
    return {
        **{name: ParamSpec((d, width), ("embed", "heads"), fan_in(d)) for name, width in maps.items()},
        "conv_C1X": ParamSpec((channels, 1, cfg.taps), ("heads", None, "conv_kernel"), fan_in(cfg.taps)),
        "decay_log_H": ParamSpec((cfg.heads,), ("heads",), Uniform(1.0)),
        "decay_bias_H": ParamSpec((cfg.heads,), ("heads",), ones()),
        "norm_V": ParamSpec((cfg.value_dim,), ("head_dim",), ones()),
        "w_o_HVD": ParamSpec((wide, d), ("heads", "embed"), fan_in(wide, gain=out_gain)),
    }


def _inputs(params: Any, x_TD: Tensor, cfg: DeltaNetConfig) -> tuple[_Inputs, Tensor]:
    """What tokens give, and their gates `[T, H, V]`."""
    mixed_TC, gate_TV, rate_TH, decay_TH = (_apart if cfg.apart else _by_key_heads)(params, x_TD, cfg)
    return _Inputs(mixed_TC, decay_TH, rate_TH), gate_TV.reshape(len(x_TD), cfg.heads, cfg.value_dim)


def _read(params: Any, given: _Inputs, ids_P: Tensor, cfg: DeltaNetConfig) -> Tensor:
    """What the queries of all tokens of a pack read within their documents, `[P, H, V]`."""
    index_P = document_index(ids_P)
    mixed_PC = _convolved(params, given.mixed_TC, index_P)
    q, k, v = (x.transpose(0, 1)[None] for x in _heads(mixed_PC, cfg))
    decay, rate = (x.mT[None] for x in _decays(params, given))
    out_BHLV, _ = gated_delta_rule(q, k, v, decay, rate, documents_BL=index_P[None])
    return out_BHLV[0].transpose(0, 1)


def _divided(params: Any, given: _Inputs, cfg: DeltaNetConfig) -> tuple[Tree, _Inputs, DeltaNetConfig]:
    """This rank's heads: their parameters, what all tokens of the pack give them, and their shapes."""
    rows = [*given.mixed_TC.split(cfg.parts, -1), given.decay_TH, given.rate_TH]
    parts_TJC = [x.unflatten(-1, (cfg.key_heads, -1)) for x in rows]
    got_PjC = divide_heads(torch.cat(parts_TJC, -1)).split([x.shape[-1] for x in parts_TJC], -1)
    q, k, v, decay_Ph, rate_Ph = (x.flatten(1) for x in got_PjC)
    taps = [x.unflatten(0, (cfg.key_heads, -1)) for x in params["conv_C1X"].split(cfg.parts)]
    own = {name: own_heads(params[name]) for name in ("decay_log_H", "decay_bias_H")}
    own["conv_C1X"] = torch.cat([own_heads(x).flatten(0, 1) for x in taps])
    shapes = replace(cfg, key_heads=got_PjC[0].shape[1], heads=decay_Ph.shape[1])
    return own, _Inputs(torch.cat([q, k, v], -1), decay_Ph, rate_Ph), shapes


def _decays(params: Any, given: _Inputs) -> tuple[Tensor, Tensor]:
    """The log of the decay, and the rate, each `[T, H]`."""
    wide = torch.promote_types(given.decay_TH.dtype, torch.float32)
    step_TH = F.softplus(given.decay_TH.to(wide) + params["decay_bias_H"])
    return -params["decay_log_H"].to(wide).exp() * step_TH, given.rate_TH.sigmoid()


def _apart(params: Any, x_TD: Tensor, cfg: DeltaNetConfig) -> tuple[Tensor, ...]:
    """Channels `[T, C]`, gates `[T, H V]`, rates and decays `[T, H]`, each by a matrix of its own."""
    del cfg
    return tuple(x_TD @ params[name] for name in ("w_mixed_DC", "w_gate_DV", "w_rate_DH", "w_decay_DH"))


def _by_key_heads(params: Any, x_TD: Tensor, cfg: DeltaNetConfig) -> tuple[Tensor, ...]:
    """The same of matrices whose columns go from key head to key head."""
    ratio = cfg.heads // cfg.key_heads
    widths = (cfg.key_dim, cfg.key_dim, ratio * cfg.value_dim, ratio * cfg.value_dim)
    q, k, v, gate = (x_TD @ params["w_in_DM"]).unflatten(-1, (cfg.key_heads, -1)).split(widths, -1)
    rate, decay = (x_TD @ params["w_rates_DH"]).unflatten(-1, (cfg.key_heads, -1)).split(ratio, -1)
    mixed_TC = torch.cat([x.flatten(1) for x in (q, k, v)], -1)
    return mixed_TC, gate, rate.flatten(1), decay.flatten(1)


def _convolved(params: Any, mixed_TC: Tensor, index_T: Tensor) -> Tensor:
    """The causal convolution of each channel within documents, and SiLU: `[T, C]`. `index_T`: of the document."""
    conv_CX = params["conv_C1X"][:, 0]
    taps, tokens = conv_CX.shape[1], len(mixed_TC)
    out_TC = mixed_TC * conv_CX[:, -1]
    for back in range(1, min(taps, tokens)):
        same_T1 = (index_T[back:] == index_T[:-back])[:, None]
        earlier_TC = torch.where(same_T1, mixed_TC[:-back], 0) * conv_CX[:, taps - 1 - back]
        out_TC = out_TC + torch.cat([mixed_TC.new_zeros(back, mixed_TC.shape[1]), earlier_TC])
    return F.silu(out_TC)


def _heads(mixed_TC: Tensor, cfg: DeltaNetConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys `[T, H, K]`, of length 1 and queries scaled by `K ** -0.5`, and values `[T, H, V]`."""
    q, k, v = mixed_TC.split(cfg.parts, -1)
    q, k = (x.unflatten(-1, (cfg.key_heads, cfg.key_dim)) for x in (q, k))
    wide = torch.promote_types(mixed_TC.dtype, torch.float32)
    q, k = (x.to(wide) * (x.to(wide).square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(cfg.heads // cfg.key_heads, 1) for x in (q * cfg.key_dim**-0.5, k))
    return q, k, v.unflatten(-1, (cfg.heads, cfg.value_dim))


def _output(params: Any, out_THV: Tensor, gate_THV: Tensor, cfg: DeltaNetConfig) -> Tensor:
    normed_THV = rms_norm(out_THV.to(gate_THV.dtype), params["norm_V"], eps=cfg.norm_eps)
    wide = torch.promote_types(gate_THV.dtype, torch.float32)
    gated_THV = (normed_THV * F.silu(gate_THV.to(wide))).to(gate_THV.dtype)
    return gated_THV.flatten(1) @ params["w_o_HVD"]


def _tails(mixed_BSC: Tensor, length_B: Tensor, taps: int) -> Tensor:
    """The last `taps - 1` rows of each sequence, with zeros before its beginning."""
    place_BX = length_B[:, None] + torch.arange(1 - taps, 0, device=length_B.device)
    row_B1 = torch.arange(len(length_B), device=length_B.device)[:, None]
    found_BXC = mixed_BSC[row_B1, place_BX.clamp(min=0)]
    return torch.where((place_BX >= 0)[..., None], found_BXC, 0)
