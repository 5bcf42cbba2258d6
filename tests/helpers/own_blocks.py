"""Blocks as a user writes them: a bilinear MLP, two attentions, a recurrent memory, and layers put together otherwise.

`reference` is each of them by its definition, one document at a time, over plain torch.

Legend: T tokens, B sequences, D width, F hidden width, H heads, K head dim, S places.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.documents import document_index, ids_of
from ftrain.kernels.rope import rope as rotate
from ftrain.modules import decoder, kv_cache, norm
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Cache, Context, Newest, Prompts
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.kv_cache import LayerCache
from ftrain.modules.layers import attention_block, mlp_block, moe_block
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import ParamSpec, fan_in, ones, zeros

D, H, K, WINDOW = 32, 4, 8, 4
HEADS = AttentionConfig(D, heads=H, kv_heads=2, head_dim=K)
BASE = DecoderConfig(61, D, layers=4, attention=HEADS, d_hidden=40)
EXPERTS = dataclasses.replace(BASE, moe=MoEConfig(D, 12, experts=8, top_k=2), d_hidden=0)


def bilinear(hidden: int = 24) -> Block:
    """`(x gate * x up) down`, without an activation (Shazeer 2020); its leaves have names of their own."""

    def specs(out_gain: float) -> Any:
        return {
            "w_in_DF": ParamSpec((D, 2 * hidden), ("embed", "mlp"), fan_in(D)),
            "w_out_FD": ParamSpec((hidden, D), ("mlp", "embed"), fan_in(hidden, gain=out_gain)),
        }

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        gate_TF, up_TF = (x_TD @ params["w_in_DF"]).chunk(2, dim=-1)
        return (gate_TF * up_TF) @ params["w_out_FD"]

    return Block(specs, apply)


def differential() -> Block:
    """Differential attention (Ye et al. 2024): what one half of the heads reads less `strength` times the other's."""

    def specs(out_gain: float) -> Any:
        names = {name: ParamSpec((D, H * K), ("embed", "heads"), fan_in(D)) for name in ("w_q", "w_k")}
        return names | {
            "w_v": ParamSpec((D, H * K // 2), ("embed", "heads"), fan_in(D)),
            "strength": ParamSpec((1,), (None,), ones()),
            "w_o": ParamSpec((H * K // 2, D), ("heads", "embed"), fan_in(H * K // 2, gain=out_gain)),
        }

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        q, k, v = ((x_TD @ params[f"w_{n}"]).unflatten(-1, (-1, K)) for n in "qkv")
        cos_sin = at.rope(HEADS)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        (q1, q2), (k1, k2) = q.chunk(2, dim=1), k.chunk(2, dim=1)
        read = at.attend(q1, k1, v) - params["strength"] * at.attend(q2, k2, v, window=WINDOW, scale=0.5)
        return read.flatten(1) @ params["w_o"]

    return Block(specs, apply)


SLOPES = torch.tensor([2.0 ** -(i + 1) for i in range(H)], dtype=torch.float64)


def sinking() -> Block:
    """ALiBi (Press et al. 2022) within a window, with a learned sink per head, in plain torch: its cache is its own."""

    def specs(out_gain: float) -> Any:
        return {
            "w_qkv": ParamSpec((D, 3 * H * K), ("embed", "heads"), fan_in(D)),
            "sink_H": ParamSpec((H,), (None,), zeros()),
            "w_o": ParamSpec((H * K, D), ("heads", "embed"), fan_in(H * K, gain=out_gain)),
        }

    def read(params: Any, scores_HTS: Tensor, distance_TS: Tensor, seen_TS: Tensor) -> Tensor:
        scores_HTS = scores_HTS - SLOPES.to(scores_HTS.dtype)[:, None, None] * distance_TS
        scores_HTS = scores_HTS.masked_fill(~(seen_TS & (distance_TS < WINDOW)), -1e30)
        sink_HT1 = params["sink_H"][:, None, None].expand(-1, scores_HTS.shape[1], 1)
        return torch.cat([scores_HTS, sink_HT1], dim=-1).softmax(-1)[..., :-1]

    def packed(params: Any, x_TD: Tensor, at: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x_TD @ params["w_qkv"]).unflatten(-1, (3, H, K)).unbind(1)
        place_T = torch.arange(len(x_TD))
        distance_TS = place_T[:, None] - place_T
        own_T = document_index(ids_of(at.segments_T))
        scores_HTS = torch.einsum("thk,shk->hts", q, k) * K**-0.5
        weights_HTS = read(params, scores_HTS, distance_TS, (own_T[:, None] == own_T) & (distance_TS >= 0))
        return torch.einsum("hts,shk->thk", weights_HTS, v).flatten(1) @ params["w_o"], k, v

    def prefill(params: Any, x_TD: Tensor, at: Prompts) -> tuple[Tensor, LayerCache]:
        y_TD, k, v = packed(params, x_TD, at)
        return y_TD, LayerCache(at.unpack(k), at.unpack(v))

    def extend(params: Any, x_BD: Tensor, state: LayerCache, at: Newest) -> tuple[Tensor, LayerCache]:
        q, k, v = (x_BD @ params["w_qkv"]).unflatten(-1, (3, H, K)).unbind(1)
        state = kv_cache.append(state, k, v, at.length_B)
        seen_BS = at.seen(state)
        k_BHSK, v_BHSK = (x[:, :, : seen_BS.shape[1]] for x in state)
        scores_HBS = torch.einsum("bhk,bhsk->hbs", q, k_BHSK) * K**-0.5
        distance_BS = at.length_B[:, None] - torch.arange(seen_BS.shape[1])
        weights_HBS = read(params, scores_HBS, distance_BS, seen_BS)
        return torch.einsum("hbs,bhsk->bhk", weights_HBS, v_BHSK).flatten(1) @ params["w_o"], state

    return Block(specs, lambda params, x_TD, at: packed(params, x_TD, at)[0], Cache(prefill, extend))


DECAY = 0.8


def retention() -> Block:
    """One head of retention (Sun et al. 2023): its memory is a matrix per sequence, `s = 0.8 s + k v`."""

    def specs(out_gain: float) -> Any:
        tree = {name: ParamSpec((D, K), ("embed", None), fan_in(D)) for name in ("w_q", "w_k", "w_v")}
        return tree | {"w_o": ParamSpec((K, D), (None, "embed"), fan_in(K, gain=out_gain))}

    def packed(params: Any, x_TD: Tensor, at: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x_TD @ params[f"w_{n}"] for n in "qkv")
        own_T, place_T = document_index(ids_of(at.segments_T)), torch.arange(len(x_TD))
        age_TS = place_T[:, None] - place_T
        fade_TS = torch.where((own_T[:, None] == own_T) & (age_TS >= 0), DECAY ** age_TS.clamp(0).to(x_TD.dtype), 0.0)
        return ((q @ k.T) * fade_TS) @ v @ params["w_o"], k, v

    def prefill(params: Any, x_TD: Tensor, at: Prompts) -> tuple[Tensor, Tensor]:
        y_TD, k, v = packed(params, x_TD, at)
        where = at.unpacking
        age_T = at.length_B[where.sequence_T] - 1 - where.place_T
        written_TKK = (DECAY ** age_T.to(k.dtype))[:, None, None] * k[:, :, None] * v[:, None, :]
        return y_TD, k.new_zeros(where.sequences, K, K).index_add(0, where.sequence_T, written_TKK)

    def extend(params: Any, x_BD: Tensor, state_BKK: Tensor, at: Newest) -> tuple[Tensor, Tensor]:
        q, k, v = (x_BD @ params[f"w_{n}"] for n in "qkv")
        state_BKK = DECAY * state_BKK + k[:, :, None] * v[:, None, :]
        return torch.einsum("bk,bkv->bv", q, state_BKK) @ params["w_o"], state_BKK

    return Block(specs, lambda params, x_TD, at: packed(params, x_TD, at)[0], Cache(prefill, extend))


def parallel(second: Block) -> Block:
    """A whole layer: the usual attention and `second` read one norm side by side, and their sum is normed again."""
    attend = attention_block(HEADS)

    def specs(out_gain: float) -> Any:
        norms = {"norm": norm.specs(D), "norm_out": norm.specs(D)}
        return norms | {"attention": attend.specs(1.0), "second": second.specs(out_gain)}

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        normed_TD = norm.apply(params["norm"], x_TD)
        both_TD = at.run(second, params["second"], normed_TD) + at.run(attend, params["attention"], normed_TD)
        return x_TD + norm.apply(params["norm_out"], both_TD)

    return Block(specs, apply, routers=second.routers)


CONFIGS = {
    "mlp": dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, mlp=bilinear()),)),
    "attention": dataclasses.replace(BASE, pattern=(None, decoder.layer_with(BASE, attention=differential()))),
    "attention in plain torch": dataclasses.replace(
        BASE, pattern=(decoder.layer_with(BASE, attention=sinking()), None)
    ),
    "memory": dataclasses.replace(BASE, pattern=(decoder.layer_with(BASE, attention=retention(), mlp=bilinear()),)),
    "layer": dataclasses.replace(BASE, pattern=(parallel(mlp_block(BASE.mlp)),)),
    "mixed": dataclasses.replace(
        BASE,
        pattern=(
            parallel(retention()),
            None,
            decoder.layer_with(BASE, attention=differential(), mlp=bilinear()),
            decoder.layer_with(BASE, attention=sinking()),
        ),
    ),
    "experts": dataclasses.replace(EXPERTS, pattern=(decoder.layer_with(EXPERTS, attention=differential()), None)),
    "experts beside": dataclasses.replace(
        EXPERTS, pattern=(None, parallel(moe_block(EXPERTS.moe)), decoder.layer_with(EXPERTS, attention=retention()))
    ),
}


def reference(params: Any, tokens_T: Tensor, lengths: list[int], kinds: tuple) -> Tensor:
    """Hidden states by the definition; `kinds` names, for each layer, its attention, its MLP, and whether they are
    side by side.
    """
    x_TD = params["embedding"]["table_VD"][tokens_T]
    for layer, (attention, second, beside) in zip(params["layers"], kinds, strict=True):
        if beside:
            normed = _rms(x_TD, layer["norm"])
            both = READERS[attention](layer["attention"], normed, lengths)
            both = both + READERS[second](layer["second"], normed, lengths)
            x_TD = x_TD + _rms(both, layer["norm_out"])
        else:
            x_TD = x_TD + READERS[attention](layer["attention"], _rms(x_TD, layer["attention_norm"]), lengths)
            x_TD = x_TD + READERS[second](layer["mlp"], _rms(x_TD, layer["mlp_norm"]), lengths)
    return _rms(x_TD, params["norm"])


def _rms(x: Tensor, params: Any) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * params["weight_D"]


def _swiglu(params: Any, x: Tensor, lengths: list[int]) -> Tensor:
    return (torch.nn.functional.silu(x @ params["w_gate_DF"]) * (x @ params["w_up_DF"])) @ params["w_down_FD"]


def _bilinear(params: Any, x: Tensor, lengths: list[int]) -> Tensor:
    half = params["w_out_FD"].shape[0]
    return ((x @ params["w_in_DF"][:, :half]) * (x @ params["w_in_DF"][:, half:])) @ params["w_out_FD"]


def _rotated(x_HK: Tensor, position: int) -> Tensor:
    angle = position * 10_000.0 ** -(torch.arange(K // 2, dtype=torch.float64) * 2 / K)
    # tables of cosines are float32, whatever the model computes in
    cos, sin = angle.cos().float().to(x_HK.dtype), angle.sin().float().to(x_HK.dtype)
    a, b = x_HK[:, : K // 2], x_HK[:, K // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _each(x: Tensor, lengths: list[int], one: Any) -> Tensor:
    return torch.cat([one(part) for part in x.split(lengths)])


def _softmax_read(q_K: Tensor, keys: list, values: list, scale: float) -> Tensor:
    weights = torch.stack([q_K @ k * scale for k in keys]).softmax(0)
    return sum(w * v for w, v in zip(weights, values, strict=True))


def _usual(params: Any, x: Tensor, lengths: list[int]) -> Tensor:
    def one(x: Tensor) -> Tensor:
        q, k, v = ((x @ params[f"w_{n}"]).unflatten(-1, (-1, K)) for n in ("q_DHK", "k_DGK", "v_DGK"))
        q = [_rotated(row, t) for t, row in enumerate(q)]
        k = [_rotated(row, t) for t, row in enumerate(k)]
        rows = [
            torch.cat(
                [
                    _softmax_read(
                        q[t][h], [k[s][h // 2] for s in range(t + 1)], [v[s][h // 2] for s in range(t + 1)], K**-0.5
                    )
                    for h in range(H)
                ]
            )
            for t in range(len(x))
        ]
        return torch.stack(rows) @ params["w_o_HKD"]

    return _each(x, lengths, one)


def _differential(params: Any, x: Tensor, lengths: list[int]) -> Tensor:
    def one(x: Tensor) -> Tensor:
        q, k, v = ((x @ params[f"w_{n}"]).unflatten(-1, (-1, K)) for n in "qkv")
        q = [_rotated(row, t) for t, row in enumerate(q)]
        k = [_rotated(row, t) for t, row in enumerate(k)]
        rows = []
        for t in range(len(x)):
            near = range(max(0, t + 1 - WINDOW), t + 1)
            parts = []
            for h in range(H // 2):
                first = _softmax_read(
                    q[t][h], [k[s][h] for s in range(t + 1)], [v[s][h] for s in range(t + 1)], K**-0.5
                )
                other = h + H // 2
                second = _softmax_read(q[t][other], [k[s][other] for s in near], [v[s][h] for s in near], 0.5)
                parts.append(first - params["strength"] * second)
            rows.append(torch.cat(parts))
        return torch.stack(rows) @ params["w_o"]

    return _each(x, lengths, one)


def _sinking(params: Any, x: Tensor, lengths: list[int]) -> Tensor:
    def one(x: Tensor) -> Tensor:
        q, k, v = (x @ params["w_qkv"]).unflatten(-1, (3, H, K)).unbind(1)
        rows = []
        for t in range(len(x)):
            near = range(max(0, t + 1 - WINDOW), t + 1)
            parts = []
            for h in range(H):
                scores = [q[t, h] @ k[s, h] / math.sqrt(K) - SLOPES[h] * (t - s) for s in near]
                weights = torch.stack([*scores, params["sink_H"][h]]).softmax(0)
                parts.append(sum(w * v[s, h] for w, s in zip(weights, near)))  # noqa: B905  # the sink reads nothing
            rows.append(torch.cat(parts))
        return torch.stack(rows) @ params["w_o"]

    return _each(x, lengths, one)


def _retention(params: Any, x: Tensor, lengths: list[int]) -> Tensor:
    def one(x: Tensor) -> Tensor:
        state, rows = x.new_zeros(K, K), []
        for x_D in x:
            state = DECAY * state + torch.outer(x_D @ params["w_k"], x_D @ params["w_v"])
            rows.append(x_D @ params["w_q"] @ state)
        return torch.stack(rows) @ params["w_o"]

    return _each(x, lengths, one)


READERS = {
    "usual": _usual,
    "differential": _differential,
    "sinking": _sinking,
    "retention": _retention,
    "swiglu": _swiglu,
    "bilinear": _bilinear,
}
KINDS = {
    "mlp": (("usual", "bilinear", False),) * 4,
    "attention": (("usual", "swiglu", False), ("differential", "swiglu", False)) * 2,
    "attention in plain torch": (("sinking", "swiglu", False), ("usual", "swiglu", False)) * 2,
    "memory": (("retention", "bilinear", False),) * 4,
    "layer": (("usual", "swiglu", True),) * 4,
    "mixed": (
        ("usual", "retention", True),
        ("usual", "swiglu", False),
        ("differential", "bilinear", False),
        ("sinking", "swiglu", False),
    ),
}
