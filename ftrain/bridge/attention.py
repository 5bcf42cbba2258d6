"""The attention of transformers' modules, by its public registry: our primitive, with the documents of the call.

Legend: B rows, L tokens of a row, S keys of a row, H query heads, G key heads, K head dim; T = B * L folded tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.batches import row_documents
from ftrain.bridge.draws import next_key
from ftrain.bridge.masks import MaskRule, read
from ftrain.bridge.token_dropout import drop_weights
from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Segments, document_index, ids_of
from ftrain.kernels.pack import pack_tokens

NAME = "ftrain"
"""The name of our functions in transformers' registries."""

_READ = {"s_aux", "sinks", "position_bias"}
_NOT_OURS = {"position_ids", "cache_position", "hidden_states"}
"""Tensors that are passed on to all attentions, and say nothing of the scores."""
_OF_TOWERS = ("image_", "video_", "audio_")
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """What attention is told of one call of a model.

    - `segments_T`: ids of the documents of the folded tokens, or None: each row is a document.
    - `source_S`: those of an encoder's tokens, which cross attention reads. `drops`: there is a key for dropout.
    - `paths`: of the modules, by their id. `sources`: the ids of an encoder's modules, whose tokens are the source's;
      None: attention over so many tokens as the source has is the encoder's.
    - `unmasked`: attention that is given no mask sees everything, as the eager one of transformers does, and a mask
      that hides nothing is none; else it is causal as its module says.
    """

    segments_T: Segments | None = None
    source_S: Segments | None = None
    drops: bool = False
    paths: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    sources: frozenset[int] | None = None
    unmasked: bool = False


_NONE = Call()
_call: ContextVar[Call] = ContextVar("ftrain_bridge_call", default=_NONE)


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Within the block attention of bridged modules works on the documents of `call`."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


_PARTS = "ftrain_parts"


def of_parts(x: Tensor, segments_P: Segments) -> Tensor:
    """A view of `x`, `[B, H, P, K]`, which as queries of `attend` has these documents, of the folded `B * P`."""
    view = x.view_as(x)
    setattr(view, _PARTS, segments_P)
    return view


@dataclass(frozen=True)
class Weighed:
    """One attention of a model, as `attend` is given it: `bias`, `[B or 1, H or 1, L, S]`, is added to its scores."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    rule: MaskRule
    bias: Tensor | None


_instead: ContextVar[Callable[[Weighed], Tensor] | None] = ContextVar("ftrain_bridge_instead", default=None)


@contextmanager
def weighing(instead: Callable[[Weighed], Tensor]) -> Iterator[None]:
    """Within the block each attention of bridged modules is `instead(weighed)`, `[B, L, H, V]`: for proofs."""
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Any:
    """What transformers' models pass to their attention as the mask: a `MaskRule`, or bool `[B, 1, L, S]` where it is
    no rule in numbers or where there is an `attention_mask` of padding, `[B, S]`.
    """
    rule = read(mask_function)
    if _call.get().unmasked and attention_mask is None and rule == MaskRule(causal=False):
        return None
    if rule is None or attention_mask is not None:
        return _dense(batch_size, q_length, kv_length, mask_function, attention_mask)
    return rule


def _dense(rows: int, L: int, S: int, function: Any, padding_BS: Tensor | None) -> Tensor:
    from transformers.masking_utils import and_masks, padding_mask_function, sdpa_mask

    if padding_BS is not None:
        function = and_masks(function, padding_mask_function(padding_BS))
    dense = sdpa_mask(rows, L, S, mask_function=function, allow_is_causal_skip=False, use_vmap=True)
    assert dense is not None
    return dense


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' registry: `[B, L, H, V]` and no weights.

    - `query`, `key`, `value`: `[B, H, L, K]`, `[B, G, S, K]`, `[B, G, S, V]`. `attention_mask`: a `MaskRule`, a dense
      mask `[B or 1, H or 1, L, S]` (bool, or numbers to add), or None: causal as the module says.
    - `options`: sliding_window, softcap, s_aux or sinks, position_bias, is_causal; numbers beside them are of other
      backends.

    Where there is a key to draw from, `dropout` is the probability of a weight to be dropped; scores are then held in
    memory. ValueError for such dropout where ranks share a sequence, and for a tensor among the options that is not
    known, such as the keys that a model has chosen.
    """
    call, instead = _call.get(), _instead.get()
    parts = getattr(query, _PARTS, None)
    call = call if parts is None else Call(parts, drops=call.drops, unmasked=True)
    drops = dropout if call.drops else 0.0
    _require_all_keys(module, drops)
    _require_known(module, options)
    rule, bias = _rule(module, attention_mask, options, call)
    if instead is not None:
        return instead(Weighed(module, query, key, value, rule, bias)), None
    if rule.dense is not None or bias is not None or drops:
        return _by_scores(query, key, value, rule, bias, scaling, options, call, module, drops), None
    cross = _is_cross(module, query, key, call)
    q_THK, k_SGK, v_SGV = _fold(query), _fold(key), _fold(value)
    segments, source = _documents(module, query, key, call, cross)
    if rule.chunk is not None:
        segments = _chunks(segments, rule.chunk, len(q_THK), query.device)
    window = rule.window
    out_THV = attention(
        q_THK,
        k_SGK,
        v_SGV,
        segments_T=segments,
        kv_segments_S=source,
        causal=rule.causal and not cross,
        window=window,
        scale=scaling,
        **_extras(options),
    )
    return out_THV.unflatten(0, query.shape[::2][:2]), None


def _require_known(module: nn.Module, options: Mapping[str, Any]) -> None:
    unknown = [
        name
        for name, x in options.items()
        if isinstance(x, Tensor) and name not in _READ and name not in _NOT_OURS and not name.startswith(_OF_TOWERS)
    ]
    if unknown:
        raise ValueError(f"{type(module).__name__} gives attention {unknown[0]!r}, which ours does not know")


def _require_all_keys(module: nn.Module, dropout: float) -> None:
    """ValueError for weights to be dropped by a rank that holds a part of the keys."""
    if dropout and pack_tokens(1) != 1:
        raise ValueError(
            f"{type(module).__name__} drops attention weights (p={dropout}), which ranks of a sequence axis cannot: "
            "set the dropout of attention to 0 in the model's configuration, or take data axes (shard, replicate)"
        )


def _rule(module: nn.Module, mask: Any, options: Mapping[str, Any], call: Call) -> tuple[MaskRule, Tensor | None]:
    """The rule of one attention, and what is added to its scores."""
    bias = options.get("position_bias")
    if isinstance(mask, MaskRule):
        rule, bias = mask, _sum(bias, mask.bias)
    elif isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            rule = MaskRule(dense=mask)
        else:
            rule, bias = MaskRule(causal=False), _sum(bias, mask)
    elif call.unmasked:
        rule = MaskRule(causal=False)
    else:
        causal = options.get("is_causal")
        rule = MaskRule(causal=bool(getattr(module, "is_causal", True) if causal is None else causal))
    if rule.window is None and options.get("sliding_window") is not None and rule.dense is None:
        rule = MaskRule(rule.causal, int(options["sliding_window"]), rule.chunk)
    return rule, bias


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _extras(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the primitive that few models use."""
    found: dict[str, Any] = {}
    sinks = options.get("s_aux", options.get("sinks"))
    if sinks is not None:
        found["sinks_H"] = sinks.flatten()
    if options.get("softcap") is not None:
        found["softcap"] = float(options["softcap"])
    return found


def _is_cross(module: nn.Module, query: Tensor, key: Tensor, call: Call) -> bool:
    path = call.paths.get(id(module), "")
    named = bool(_CROSS.search(path.rpartition("layers")[2])) or bool(getattr(module, "is_cross_attention", False))
    return query.shape[2] != key.shape[2] or named


def _documents(
    module: nn.Module, query: Tensor, key: Tensor, call: Call, cross: bool
) -> tuple[Segments | None, Segments | None]:
    """The documents of the queries, and those of the keys where they are another pack's."""
    rows, length, keys = query.shape[0], query.shape[2], key.shape[2]
    if cross:
        own = row_documents(rows, length, query.device) if call.segments_T is None else call.segments_T
        theirs = row_documents(rows, keys, query.device) if call.source_S is None else call.source_S
        return own, theirs
    if call.sources is not None:
        side = call.source_S if id(module) in call.sources else call.segments_T
        return row_documents(rows, length, query.device) if side is None and rows > 1 else side, None
    fitting = [s for s in (call.segments_T, call.source_S) if s is not None and _length(s) == rows * length]
    if fitting:
        return fitting[0], None
    return (None if rows == 1 else row_documents(rows, length, query.device)), None


def _length(segments: Segments) -> int:
    return int(ids_of(segments).shape[0])


def _chunks(segments: Segments | None, size: int, tokens: int, device: torch.device) -> Tensor:
    """Ids in which each chunk of a document is one."""
    ids = torch.zeros(tokens, dtype=torch.int64, device=device) if segments is None else ids_of(segments)
    index = document_index(ids)
    place = torch.arange(tokens, device=device)
    first = torch.full((tokens,), tokens, device=device, dtype=place.dtype).scatter_reduce(0, index, place, "amin")
    return index * tokens + (place - first[index]) // size


def _fold(x: Tensor) -> Tensor:
    """`[B, H, L, K]` as `[B * L, H, K]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: MaskRule,
    bias: Tensor | None,
    scaling: float | None,
    options: Mapping[str, Any],
    call: Call,
    module: nn.Module,
    dropout: float,
) -> Tensor:
    """Attention with scores `[B, H, L, S]` in memory: for masks that are no rule, numbers added to scores, dropout."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if options.get("softcap") is not None:
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    if bias is not None:
        scores = scores + bias[..., : key.shape[2]]
    seen = _seen(query, key, rule, call, module)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    sinks = options.get("s_aux", options.get("sinks"))
    if sinks is not None:
        own = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, own.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : key.shape[2]]
    weights = drop_weights(next_key(), weights, dropout) if dropout else weights
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def _seen(query: Tensor, key: Tensor, rule: MaskRule, call: Call, module: nn.Module) -> Tensor | None:
    """Bool `[B or 1, H or 1, L, S]`: the rule and the documents; None if everything is seen."""
    rows, L, S = query.shape[0], query.shape[2], key.shape[2]
    cross = _is_cross(module, query, key, call)
    found = rule.dense if rule.dense is not None or cross else _near(rule, L, query.device)
    own, theirs = _documents(module, query, key, call, cross)
    if rule.chunk is not None and not cross:
        own = _chunks(own, rule.chunk, rows * L, query.device)
    elif own is None or (rows > 1 and call.segments_T is None):
        return found
    id_BL = ids_of(own).unflatten(0, (rows, L))
    id_BS = id_BL if theirs is None else ids_of(theirs).unflatten(0, (rows, S))
    same = (id_BL[:, :, None] == id_BS[:, None, :])[:, None]
    return same if found is None else same & found


def _near(rule: MaskRule, L: int, device: torch.device) -> Tensor | None:
    """Bool `[L, L]`: which keys a query sees by their places alone; None if all."""
    apart_LL = torch.arange(L, device=device)[:, None] - torch.arange(L, device=device)
    found = apart_LL >= 0 if rule.causal else None
    if rule.window is not None:
        close = (apart_LL if rule.causal else apart_LL.abs()) < rule.window
        found = close if found is None else found & close
    return found
