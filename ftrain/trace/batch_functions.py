"""Functions of torch that keep rows of the batch apart, though some of their ops would look as if they mixed them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.trace.batch_kinds import SAME, Kind

_F = torch.nn.functional
KindOf = Callable[[Any], Kind]
"""The kind of a value of the trace; of None and numbers "unknown"."""


def kept_apart(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], kind_of: KindOf
) -> tuple[Kind, ...] | None:
    """The kinds of what `func` gives for these arguments, one for each tensor; None where it may mix rows, or is not
    known here.
    """
    rule = _RULES.get(func)
    if rule is None:
        return None
    if func is torch.instance_norm:  # written in C: without a signature
        return rule({"input": args[0] if args else kwargs["input"]}, kind_of)
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    return rule(given.arguments, kind_of)


def _normalised(given: Mapping[str, Any], kind_of: KindOf) -> tuple[Kind, ...] | None:
    """Each row and channel alone, as one dim."""
    kind = kind_of(given["input"])
    return (kind,) if kind.what == "rows" else None


def _attended(given: Mapping[str, Any], kind_of: KindOf) -> tuple[Kind, ...] | None:
    """Queries, keys and values `[tokens, rows, width]`, masks `[rows, tokens]` or the same for all rows."""
    kinds = [kind_of(given[name]) for name in ("query", "key", "value")]
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    rowwise = given["query"].dim() == 3 and all(k.what == "rows" and k.dim == 1 for k in kinds)
    padded = padding is None or _along_rows(padding, kind_of)
    masked = mask is None or (mask.dim() == 2 and kind_of(mask) == SAME)
    masked = masked or (mask.dim() == 3 and _along_rows(mask, kind_of))
    if not (rowwise and padded and masked):
        return None
    return (kinds[0], kinds[0]._replace(dim=0)) if given["need_weights"] else (kinds[0],)


def _bagged(given: Mapping[str, Any], kind_of: KindOf) -> tuple[Kind, ...] | None:
    """A bag of ids `[rows, ids]` for each row."""
    ids, weights = given["input"], given["per_sample_weights"]
    alone = given["offsets"] is None and given["max_norm"] is None and not given["scale_grad_by_freq"]
    fits = ids.dim() == 2 and _along_rows(ids, kind_of) and kind_of(given["weight"]) == SAME
    fits = fits and (weights is None or _along_rows(weights, kind_of))
    return (kind_of(ids),) if alone and fits else None


def _along_rows(tensor: Tensor, kind_of: KindOf) -> bool:
    kind = kind_of(tensor)
    return kind.what == "rows" and kind.dim == 0


_RULES: Mapping[Callable[..., Any], Callable[[Mapping[str, Any], KindOf], tuple[Kind, ...] | None]] = {
    _F.instance_norm: _normalised,
    torch.instance_norm: _normalised,
    _F.multi_head_attention_forward: _attended,
    _F.embedding_bag: _bagged,
}
