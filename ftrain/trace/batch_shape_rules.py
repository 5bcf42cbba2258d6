"""Rules of the ops that move, cut, join and look up rows of the batch: along which dim they run afterwards."""

from math import prod
from typing import Any

import torch
from torch import fx

from ftrain.trace.batch_kinds import (
    MIXED,
    NOTHING,
    SAME,
    UNKNOWN,
    Found,
    Kind,
    Kinds,
    Rule,
    first_of,
    joined,
    name_of,
    own_order,
    reader,
    rows_in,
)  # fmt: skip
from ftrain.trace.batch_places import column, read_at
from ftrain.trace.spread_ops import tensor_of


def part_of_result(node: fx.Node, kinds: Kinds) -> Found:
    """One tensor of several that an op gives."""
    kind, value = next(iter(kinds.values())), tensor_of(node)
    if kind.what == "found":
        return column(kind, node.args[1])
    size = value is not None and kind.what == "rows" and kind.dim < value.dim()
    if size and kind.part:
        kind = kind._replace(order=f"{kind.order} {node.args[1]}")
    return Found(kind if size or kind.what != "rows" else UNKNOWN)


def _viewed(node: fx.Node, kinds: Kinds) -> Found:
    """Another shape of the same numbers: where the rows are now, and whether they are whole blocks."""
    kind, before = first_of(node, kinds)
    after = tensor_of(node)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    sizes = [] if after is None else list(after.shape)
    if not all(isinstance(n, int) for n in [*before.shape, *sizes]):
        return Found(kind) if after is not None and kind.dim == 0 and before.shape[0] is sizes[0] else NOTHING
    first, size = prod(before.shape[: kind.dim]), before.shape[kind.dim]
    places = [d for d in range(len(sizes)) if prod(sizes[:d]) == first]
    if size == 1:
        places = [d for d in places if sizes[d] == 1]
        return Found(kind._replace(dim=places[0])) if len(places) == 1 else NOTHING
    if kind.order.startswith(_FOLDED):
        return _unfolded(node, kind, first, size, sizes)
    for d in places:
        if _whole_groups(sizes[d], size):
            if sizes[d] != size and _open_elsewhere(node, d):
                return MIXED
            return Found(kind._replace(dim=d)) if d <= kind.dim else _behind_ones(node, kind, d)
    return _folded(kind, first, size, sizes)


def _open_elsewhere(node: fx.Node, dim: int) -> bool:
    """True for groups of rows whose number is given, so that a rank forms as many of its share, of smaller ones."""
    asked = list(node.args[1]) if isinstance(node.args[1], list | tuple) else []
    return -1 in asked and asked.index(-1) != dim


def _whole_groups(size: int, rows: int) -> bool:
    """True for a dim of rows that becomes one of groups of rows, or of parts of rows."""
    return size > 1 and (size % rows == 0 or rows % size == 0)


def _open_before(node: fx.Node, dim: int) -> bool:
    asked = list(node.args[1]) if isinstance(node.args[1], list | tuple) else []
    return -1 in asked[:dim]


_FOLDED = "folded "


def _folded(kind: Kind, first: int, size: int, sizes: list[int]) -> Found:
    """Rows that become one dim with the dims before them (`x.flatten(0, 1)` of rows along dim 1)."""
    for d, merged in enumerate(sizes):
        before = prod(sizes[:d])
        blocks = first // before if before and first % before == 0 else 0
        if blocks > 1 and merged % blocks == 0 and _whole_groups(merged // blocks, size):
            return Found(Kind("rows", d, f"{_FOLDED}{blocks} {kind.order}"))
    return NOTHING


def _unfolded(node: fx.Node, kind: Kind, first: int, size: int, sizes: list[int]) -> Found:
    """Rows that get a dim of their own again. Where the call gives its size and leaves another open, it may be a number
    that a rank's rows only happen to have.
    """
    blocks, _, order = kind.order.removeprefix(_FOLDED).partition(" ")
    for d, own in enumerate(sizes):
        if prod(sizes[:d]) == first * int(blocks) and _whole_groups(own, size // int(blocks)):
            fits = own == size // int(blocks) and not _open_before(node, d)
            return Found(Kind("rows", d, order)) if fits or not _open_elsewhere(node, d) else NOTHING
    same = [d for d, own in enumerate(sizes) if prod(sizes[:d]) == first and own == size]
    return Found(kind._replace(dim=same[0])) if same else NOTHING


def _behind_ones(node: fx.Node, kind: Kind, dim: int) -> Found:
    """Rows that got dims of size 1 before them: a pack as one row (`x.view(1, -1)`), or a rank's only group of rows
    (`x.view(-1, 4)`), whose dim is then the rows'. What the call leaves open tells which.
    """
    asked = list(node.args[1]) if isinstance(node.args[1], list | tuple) else []
    return Found(kind._replace(dim=min(asked.index(-1), dim) if -1 in asked else dim))


def _permuted(node: fx.Node, kinds: Kinds) -> Found:
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    order, rank, read = list(range(value.dim())), value.dim(), reader(node)
    name = name_of(node)
    if name == "permute":
        order = [d % rank for d in read("dims")]
    elif rank > 1:
        a, b = (0, 1) if name == "t" else (read("dim0") % rank, read("dim1") % rank)
        order[a], order[b] = order[b], order[a]
    return Found(kind._replace(dim=order.index(kind.dim)))


def _unsqueezed(node: fx.Node, kinds: Kinds) -> Found:
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    at = reader(node)("dim") % (value.dim() + 1)
    return Found(kind._replace(dim=kind.dim + (at <= kind.dim)))


def _squeezed(node: fx.Node, kinds: Kinds) -> Found:
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    given = reader(node)("dim")
    dims = range(value.dim()) if given is None else [given] if isinstance(given, int) else given
    gone = {d % value.dim() for d in dims if value.shape[d] == 1}
    return NOTHING if kind.dim in gone else Found(kind._replace(dim=kind.dim - sum(d < kind.dim for d in gone)))


def _as_complex(node: fx.Node, kinds: Kinds) -> Found:
    """Pairs of numbers, the last dim, as complex numbers, or back."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    pairs = name_of(node) == "view_as_complex" and kind.dim == value.dim() - 1
    return NOTHING if pairs else Found(kind)


def _windows(node: fx.Node, kinds: Kinds) -> Found:
    """Overlapping parts of one dim."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    return MIXED if (reader(node)("dimension") or 0) % value.dim() == kind.dim else Found(kind)


def _repeated(node: fx.Node, kinds: Kinds) -> Found:
    """Copies along dims: along the rows they are rows in an order of their own."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    times = list(reader(node)("repeats"))
    at = kind.dim + len(times) - value.dim()
    return Found(Kind("rows", at, kind.order if times[at] == 1 else ""))


def _expanded(node: fx.Node, kinds: Kinds) -> Found:
    kind, value = first_of(node, kinds)
    after = tensor_of(node)
    if kind.what != "rows" or after is None:
        return Found(kind) if kind.partial else NOTHING
    at = kind.dim + after.dim() - value.dim()
    return Found(kind._replace(dim=at)) if after.shape[at] == value.shape[kind.dim] else NOTHING


def _cut(node: fx.Node, kinds: Kinds) -> Found:
    """A part of one dim."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    read, name = reader(node), name_of(node)
    dim = (read("dim") or 0) % value.dim()
    if name == "slice":
        after = tensor_of(node)
        whole = after is not None and after.shape[dim] == value.shape[dim]
        return Found(kind if dim != kind.dim or whole else Kind("rows", kind.dim))
    if name == "select":
        return MIXED if dim == kind.dim else Found(kind._replace(dim=kind.dim - (dim < kind.dim)))
    if dim != kind.dim:
        return Found(kind._replace(dim=kind.dim - (name == "unbind" and dim < kind.dim)))
    return Found(Kind("rows", kind.dim, f"part of {node.args[0]}")) if "split" in name else NOTHING


def _concatenated(node: fx.Node, kinds: Kinds) -> Found:
    """Several along one dim: along the rows they are rows in an order of their own."""
    what = {k.what for k in kinds.values()}
    if any(k.partial for k in kinds.values()):
        return Found(next(iter(kinds.values()))) if len(what) == 1 else NOTHING
    found, value = [k for k, _ in rows_in(node, kinds)], tensor_of(node)
    if value is None or len({k.dim for k in found}) != 1:
        return NOTHING
    at, dim = (reader(node)("dim") or 0) % value.dim(), found[0].dim
    if name_of(node) == "stack":
        return Found(Kind("rows", dim + (at <= dim), joined(found)))
    return Found(Kind("rows", dim, joined(found) if at != dim else ""))


def _looked_up(node: fx.Node, kinds: Kinds) -> Found:
    """Rows of the first argument at indices along one dim."""
    kind, value = first_of(node, kinds)
    name, places = name_of(node), node.args[1] if name_of(node) == "embedding" else node.args[2]
    index, own = kinds.get(places, UNKNOWN), tensor_of(places)  # type: ignore[arg-type]
    dim: int = 0 if name == "embedding" else node.args[1] % value.dim()  # type: ignore[operator,assignment]
    if own is None:
        return NOTHING
    if name == "embedding" and index.what == "rows" and True in node.args[3:4]:
        return MIXED  # scale_grad_by_freq: its backward counts an index over the whole batch
    if kind.partial:
        return MIXED if index.what == "rows" else Found(kind) if index == SAME else NOTHING
    if index.what == "places":
        return read_at(kind, value, [(dim, index, own)]) if name != "gather" else NOTHING
    if kind.what == "rows" and kind.dim == dim:
        if index.what != "unknown":
            return MIXED
        return Found(Kind("rows", dim)) if own.dim() == 1 or name == "gather" else NOTHING  # a rank's own places
    if name == "gather":
        found = [k for k in (kind, index) if k.what == "rows"]
        if kind == SAME and (index.dim == dim or value.shape[index.dim] == 1):
            return Found(index)
        alike = len({k.dim for k in found}) == 1 and found[0].dim != dim and kind != SAME
        return Found(Kind("rows", found[0].dim, joined(found))) if alike else NOTHING
    if kind.what == "rows":
        return Found(kind._replace(dim=kind.dim + (own.dim() - 1 if dim < kind.dim else 0)))
    return Found(index._replace(dim=dim + index.dim)) if kind == SAME and index.what == "rows" else NOTHING


def _indexed(node: fx.Node, kinds: Kinds) -> Found:
    """`x[a, b]` with tensors: those of the rows themselves choose among a rank's own."""
    kind, _ = first_of(node, kinds)
    at = [(d, n) for d, n in enumerate(node.args[1]) if n is not None]  # type: ignore[arg-type]
    indices = [(d, kinds.get(n, UNKNOWN), tensor_of(n)) for d, n in at]
    if not indices or any(own is None for _, _, own in indices):
        return NOTHING
    if any(k.what == "places" for _, k, _ in indices):
        return read_at(kind, tensor_of(node.args[0]), indices)
    by_rows = [k for _, k, _ in indices if k.what == "rows"]
    if kind.partial:
        return MIXED if by_rows else Found(kind) if all(k == SAME for _, k, _ in indices) else NOTHING
    first, rank = indices[0][0], max(own.dim() for *_, own in indices)  # type: ignore[union-attr]
    if any(own.dtype in (torch.bool, torch.uint8) for *_, own in indices):  # type: ignore[union-attr]
        chosen = len(indices) == 1 and by_rows and (kind == SAME or (kind.what == "rows" and kind.dim == first))
        return Found(Kind("rows", first, own_order(at[0][1]))) if chosen else NOTHING
    adjacent = [d for d, *_ in indices] == list(range(first, first + len(indices)))
    if kind.what == "rows" and kind.dim not in [d for d, *_ in indices]:
        gone = len(indices) - rank if first < kind.dim else 0
        return Found(kind._replace(dim=kind.dim - gone)) if adjacent and not by_rows else NOTHING
    if kind.what == "rows" and not all(_counts_rows(n) for d, n in at if d == kind.dim):
        own_places = len(indices) == 1 and indices[0][1].what == "unknown" and rank == 1
        return Found(Kind("rows", first)) if own_places else MIXED
    places = {first + k.dim + rank - own.dim() for _, k, own in indices if k.what == "rows"}  # type: ignore[union-attr]
    if not adjacent or len(places) != 1:
        return NOTHING
    return Found(Kind("rows", places.pop(), joined(by_rows) if kind == SAME else ""))


def _counts_rows(node: Any) -> bool:
    """True for 0, 1, 2, ... as an index (`h[torch.arange(len(h)), labels]`)."""
    while isinstance(node, fx.Node) and name_of(node) in ("view", "unsqueeze", "expand", "_to_copy", "alias"):
        node = node.args[0]
    return isinstance(node, fx.Node) and name_of(node) == "arange" and reader(node)("start") in (None, 0)


def _restrided(node: fx.Node, kinds: Kinds) -> Found:
    """The same numbers in the same places: strides of dims of size 1 say nothing."""
    kind, value = first_of(node, kinds)
    read = reader(node)
    pairs = zip(value.shape, read("stride"), value.stride(), strict=False)
    told = list(read("size")) == list(value.shape) and all(a == b for size, a, b in pairs if size != 1)
    return Found(kind) if told else NOTHING


def _padded(node: fx.Node, kinds: Kinds) -> Found:
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    pad = reader(node)("pad")
    at = 2 * (value.dim() - 1 - kind.dim)
    return Found(kind._replace(order="") if any(pad[at : at + 2]) else kind)


def _written_over(node: fx.Node, kinds: Kinds) -> Found:
    """A tensor of rows of which a part along another dim is replaced, row by row."""
    if any(k.partial for k in kinds.values()):
        return MIXED
    value, found = tensor_of(node), [k for k, _ in rows_in(node, kinds)]
    if value is None or len(found) < len(node.all_input_nodes) or len({k.dim for k in found}) > 1:
        return NOTHING
    along = (reader(node)("dim") or 0) % value.dim()
    return NOTHING if along == found[0].dim else Found(Kind("rows", found[0].dim, joined(found)))


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _viewed),
    **dict.fromkeys(("permute", "t", "transpose"), _permuted),
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "expand": _expanded,
    **dict.fromkeys(("view_as_real", "view_as_complex"), _as_complex),
    "unfold": _windows,
    "repeat": _repeated,
    **dict.fromkeys(("slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split"), _cut),
    **dict.fromkeys(("cat", "stack"), _concatenated),
    **dict.fromkeys(("embedding", "index_select", "gather"), _looked_up),
    "index": _indexed,
    "constant_pad_nd": _padded,
    "as_strided": _restrided,
    "slice_scatter": _written_over,
}
