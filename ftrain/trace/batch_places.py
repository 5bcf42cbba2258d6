"""Rows of the batch that the data choose: places that `nonzero` finds, what is read at them, and written there.

`t, k = torch.where(chosen == e)` gives a rank the places of its own rows. `h[t]` are some of its rows, and
`out.index_add(0, t, y)` brings them back; both are what one device has of these rows. What else is done with places (a
sum, a number of the largest) would be another number on each rank, and no rule allows it.
"""

from typing import Any

import torch
from torch import fx

from ftrain.trace.batch_kinds import MIXED, NOTHING, SAME, UNKNOWN, Found, Kind, Kinds, first_of, name_of, own_order
from ftrain.trace.spread_ops import tensor_of


def found(node: fx.Node, kinds: Kinds) -> Found:
    """`nonzero`: a column of places for each dim of the tensor."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return MIXED if kind.partial else NOTHING
    return Found(Kind("found", kind.dim, f"{value.shape[kind.dim]}|{kind.order}|{own_order(node)}"))


def column(kind: Kind, number: Any) -> Found:
    """One column of what `nonzero` found: the places of rows, or what belongs to each of these rows."""
    if not isinstance(number, int) or number < 0:
        return NOTHING
    return Found(kind._replace(what="places", dim=0) if number == kind.dim else Kind("rows", 0, _chosen(kind)))


def of_columns(node: fx.Node, kinds: Kinds) -> Found:
    """An op that takes what `nonzero` found apart, or copies places."""
    kind, value = first_of(node, kinds)
    name, after = name_of(node), tensor_of(node)
    if name in ("alias", "detach", "clone", "_to_copy") or (name == "unbind" and node.args[1:] == (1,)):
        return Found(kind)
    if kind.what == "found" and name == "select" and node.args[1] == 1:
        return column(kind, node.args[2])
    single = kind.what == "found" and value.shape[1] == 1 and after is not None and after.dim() == 1
    return column(kind, 0) if single and name in ("squeeze", "view") else NOTHING


def read_at(rows: Kind, value: Any, at: list[tuple[int, Kind, Any]]) -> Found:
    """`value[indices]` (any shape) of these rows; `at`: the dim, kind and value of each index, of which some are
    places.
    """
    first, last = at[0][0], at[-1][0]
    own = next(k for _, k, _ in at if k.what == "places")
    others = [k for _, k, _ in at if k is not own]
    fits = rows.what == "rows" and any(k is own and d == rows.dim for d, k, _ in at) and _as_many(own, value, rows.dim)
    alike = all(k == SAME or (k.what == "rows" and k.order == _chosen(own)) for k in others)
    vectors = all(x is not None and x.dim() == 1 for *_, x in at) and last - first == len(at) - 1
    return Found(Kind("rows", first, _chosen(own))) if fits and alike and vectors else MIXED


def write_at(node: fx.Node, kinds: Kinds) -> Found | None:
    """Values at places of a rank's own rows, or at those that a mask of them chooses; None for other writes."""
    target: Any = node.args[0]
    place = _place(node)
    if place is None:
        return None
    dim, index, values = place
    kind, value, own = kinds.get(target, UNKNOWN), tensor_of(target), kinds.get(index, UNKNOWN)
    written = kinds.get(values, SAME)
    if own.what == "places":
        fits, order, joined = _as_many(own, value, dim), _chosen(own), own.order.split("|")[1]
    else:
        mask = tensor_of(index)
        fits = own.what == "rows" and mask is not None and mask.dim() == 1 and mask.dtype == torch.bool
        order, joined = own_order(index), own.order
    if not fits or not (written == SAME or (written.what == "rows" and written.dim == dim and written.order == order)):
        return MIXED if own.what == "places" else None
    if kind.what == "rows":
        return Found(kind) if kind.dim == dim else MIXED
    return Found(Kind("rows", dim, joined)) if kind == SAME else None


def _place(node: fx.Node) -> tuple[int, fx.Node, Any] | None:
    """Along which dim a write is, by which index, and what is written; None without one index alone."""
    if name_of(node) in ("index_add", "index_copy", "index_fill"):
        found: tuple[Any, ...] = node.args
        target, dim, index, values = found[:4]
        value = tensor_of(target)
        return None if value is None or not isinstance(index, fx.Node) else (dim % value.dim(), index, values)
    indices = node.args[1] if name_of(node) == "index_put" else None
    given = [(d, n) for d, n in enumerate(indices) if n is not None] if isinstance(indices, list | tuple) else []
    if len(given) != 1 or not isinstance(given[0][1], fx.Node):
        return None
    return given[0][0], given[0][1], node.args[2]


def _as_many(places: Kind, value: Any, dim: int) -> bool:
    """True for a tensor with as many rows as those among which the places are: on one device, too, it has them all."""
    return value is not None and str(value.shape[dim]) == places.order.split("|")[0]


def _chosen(places: Kind) -> str:
    """The order of the rows that are at these places."""
    return places.order.split("|")[2]
