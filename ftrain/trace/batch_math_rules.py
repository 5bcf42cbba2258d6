"""Rules of the ops that compute with rows of the batch: row by row, summed over the rows, or across them."""

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
    reader,
    rows_in,
)  # fmt: skip
from ftrain.trace.batch_places import found, write_at
from ftrain.trace.spread_ops import reduced_dims, tensor_of


def elementwise(node: fx.Node, kinds: Kinds) -> Found:
    """Number by number, with the usual broadcasting."""
    if any(k.partial for k in kinds.values()):
        return _of_parts(node, kinds)
    value = tensor_of(node)
    if value is None:
        return NOTHING
    found = list[Kind]()
    for kind, own in rows_in(node, kinds):
        at = kind.dim + value.dim() - own.dim()
        if own.shape[kind.dim] != value.shape[at]:
            return NOTHING
        found.append(Kind("rows", at, kind.order))
    apart = any(k.part for k in found) and len({k.order for k in found}) > 1
    if apart or len({k.dim for k in found}) > 1:
        return MIXED
    return Found(Kind("rows", found[0].dim, joined(found)))


_COPIES = {"clone", "detach", "alias", "_to_copy", "to", "contiguous", "lift_fresh_copy", "copy", "neg"}


def _of_parts(node: fx.Node, kinds: Kinds) -> Found:
    """An op on parts of sums and means: they stay parts where it is linear in them."""
    name = name_of(node)
    if name == "copy" and kinds.get(node.args[0]) == SAME:  # type: ignore[arg-type]
        return Found(kinds.get(node.args[1], SAME))  # type: ignore[arg-type]
    what = {k.what for k in kinds.values()}
    parts = [n for n, k in kinds.items() if k.partial]
    if name in _COPIES or name in ("add", "sub", "rsub"):
        if "unknown" in what and not {"rows"} & what:
            return NOTHING
        if "rows" in what or {"sum", "mean"} <= what or ("sum" in what and _adds_once_a_rank(node, kinds)):
            return MIXED
        return Found(kinds[parts[0]])
    if name in ("mul", "div") and len(parts) == 1:
        numerator = name == "mul" or node.args[0] is parts[0]
        twice = node.args[0] is node.args[1]
        if numerator and not twice and not reader(node)("rounding_mode"):
            return MIXED if "rows" in what else NOTHING if "unknown" in what else Found(kinds[parts[0]])
    return MIXED


_ZEROS = {"zeros", "new_zeros", "zeros_like", "zero"}
_NEGLIGIBLE = 1e-6  # what is added to a divisor so that it is not zero


def _adds_once_a_rank(node: fx.Node, kinds: Kinds) -> bool:
    """True if something else than zero, which all ranks have alike, is added to a part of a sum."""
    numbers = [x for x in node.args[:2] if isinstance(x, int | float)]
    same = [n for n in node.all_input_nodes if kinds[n].what == "same"]
    return any(abs(x) > _NEGLIGIBLE for x in numbers) or any(name_of(n) not in _ZEROS for n in same)


def loss(node: fx.Node, kinds: Kinds) -> Found:
    """Torch's losses: their reduction is 0 (none), 1 (mean) or 2 (sum)."""
    if any(k.partial for k in kinds.values()):
        return MIXED
    kind, _ = first_of(node, kinds)
    how = reader(node)("reduction")
    if how == 0 or kind.what != "rows":
        return Found(kind) if kind.what == "rows" and kind.dim == 0 else NOTHING
    return Found(Kind("sum" if how == 2 else "mean"))


_LINEAR = {"sum": "sum", "mean": "mean", "count_nonzero": "sum", "nansum": "sum"}


def _reduced(node: fx.Node, kinds: Kinds) -> Found:
    kind, value = first_of(node, kinds)
    name = name_of(node)
    if kind.partial:
        return Found(kind) if name in ("sum", "mean") else MIXED
    if kind.what != "rows":
        return NOTHING
    dims, keep = reduced_dims(node, value.dim())
    if kind.dim not in dims:
        return Found(kind._replace(dim=kind.dim - (0 if keep else sum(d < kind.dim for d in dims))))
    if name not in _LINEAR:
        return MIXED
    if name == "mean" and not isinstance(value.shape[kind.dim], int):
        return MIXED  # a mean over as many as the data say: on each rank others
    return Found(Kind(_LINEAR[name] if kind.ordered or name != "mean" else "sum"))


def _along(node: fx.Node, kinds: Kinds) -> Found:
    """An op that works along some dims, and number by number along the others."""
    kind, value = first_of(node, kinds)
    if kind.partial:
        return Found(kind) if name_of(node) in ("cumsum", "flip", "roll") else MIXED
    if kind.what != "rows":
        return NOTHING
    read = reader(node)
    given = read("dims") if read("dims") is not None else read("dim")
    dims = [given] if isinstance(given, int) else given
    every = not dims
    return MIXED if every or kind.dim in {d % value.dim() for d in dims} else Found(kind)


# where the factors begin, which dims of each are dims of the result, and which dim of each is summed over
_PRODUCTS: dict[str, tuple[int, tuple[dict[int, int], dict[int, int]], tuple[int, int]]] = {
    "mm": (0, ({0: 0}, {1: 1}), (1, 0)),
    "addmm": (1, ({0: 0}, {1: 1}), (1, 0)),
    "bmm": (0, ({0: 0, 1: 1}, {0: 0, 2: 2}), (2, 1)),
    "baddbmm": (1, ({0: 0, 1: 1}, {0: 0, 2: 2}), (2, 1)),
    "mv": (0, ({0: 0}, {}), (1, 0)),
    "dot": (0, ({}, {}), (0, 0)),
    "vdot": (0, ({}, {}), (0, 0)),
}


def _product(node: fx.Node, kinds: Kinds) -> Found:
    added, kept, summed = _PRODUCTS[name_of(node)]
    a, b = (kinds.get(n, UNKNOWN) for n in node.args[added : added + 2])  # type: ignore[arg-type]
    if a.partial or b.partial:
        other = b if a.partial else a
        part = a if a.partial else b
        linear = other.what == "same" and added == 0
        return Found(part) if linear else MIXED if other.what == "rows" or other.partial else NOTHING
    places = [k[x.dim] for k, x in zip(kept, (a, b), strict=True) if x.what == "rows" and x.dim in k]
    over = [x.what == "rows" and x.dim == d for x, d in zip((a, b), summed, strict=True)]
    if all(over):
        return Found(Kind("sum"))
    if any(over):
        return NOTHING
    if len(set(places)) > 1:
        return MIXED
    found = [x for x in (a, b) if x.what == "rows"]
    return Found(Kind("rows", places[0], joined(found))) if places else NOTHING


def _normalised(node: fx.Node, kinds: Kinds) -> Found:
    """Over the last dims."""
    kind, value = first_of(node, kinds)
    if kind.partial:
        return MIXED
    if kind.what != "rows":
        return NOTHING
    return Found(kind) if kind.dim < value.dim() - len(reader(node)("normalized_shape")) else MIXED


def _crossed(node: fx.Node, kinds: Kinds) -> Found:
    """Products of vectors along a dim."""
    found, value = elementwise(node, kinds), tensor_of(node)
    along = value is not None and found.kind.what == "rows" and reader(node)("dim") % value.dim() == found.kind.dim
    return MIXED if along else found


def _places_in_table(node: fx.Node, kinds: Kinds) -> Found:
    """Where each number is in a sorted table, which is each row's own or that of all (`bucketize`, `searchsorted`)."""
    if any(k.partial for k in kinds.values()):
        return MIXED
    table, values = _two_first(node)
    if name_of(node) == "bucketize":
        table, values = values, table
    of_table, of_values = kinds.get(table, UNKNOWN), kinds.get(values, UNKNOWN)
    if of_table == SAME and of_values.what == "rows":
        return Found(of_values)
    shape = tensor_of(table)
    alike = of_table.what == of_values.what == "rows" and of_table.dim == of_values.dim
    return Found(of_values) if alike and shape is not None and of_table.dim < shape.dim() - 1 else MIXED


def _two_first(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = node.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return first, second


def _drawn(node: fx.Node, kinds: Kinds) -> Found:
    """Random numbers that depend on each number, or row, alone."""
    kind, value = first_of(node, kinds)
    if kind.partial:
        return MIXED
    last = name_of(node) == "multinomial" and kind.dim == value.dim() - 1
    return NOTHING if kind.what != "rows" else MIXED if last else Found(kind)


def _into_places(node: fx.Node, kinds: Kinds) -> Found:
    """Rows that are added up, or put, at places which an index names: a rank has only its own."""
    at_places = write_at(node, kinds)
    if at_places is not None:
        return at_places
    target = kinds.get(node.args[0], UNKNOWN)  # type: ignore[arg-type]
    given = [k for n, k in kinds.items() if n is not node.args[0]]
    if target.what == "rows" or not any(k.what == "rows" or k.partial for k in given):
        if target.what != "rows" or target.dim != 0 or not _elsewhere(node):
            return _masked_write(node, kinds, target)
        indexed = name_of(node).startswith("index_")  # along one dim, by an index of all rows
        given = [k for n, k in kinds.items() if n is not node.args[0] and not (indexed and n is node.args[2])]
        return Found(target) if all(k.what == "rows" and k.dim == 0 for k in given) else MIXED
    within = _into_each_row(node, target, kinds)
    if within is not None:
        return within
    zeros = isinstance(node.args[0], fx.Node) and name_of(node.args[0]) in _ZEROS
    adds = name_of(node) in ("index_add", "scatter_add") or (name_of(node) == "index_put" and len(node.args) > 3)
    return Found(Kind("sum")) if zeros and adds else MIXED


def _into_each_row(node: fx.Node, target: Kind, kinds: Kinds) -> Found | None:
    """`torch.zeros_like(h).scatter(1, places, values)`: into as many rows as the places have, along another dim.

    None for another write.
    """
    index, value = (node.args[2] if len(node.args) > 2 else None), tensor_of(node)
    found = kinds.get(index, UNKNOWN)  # type: ignore[arg-type]
    own = tensor_of(index) if isinstance(index, fx.Node) else None
    if not name_of(node).startswith("scatter") or target != SAME or found.what != "rows" or own is None:
        return None
    others = [k for n, k in kinds.items() if n not in (node.args[0], index)]
    alike = all(k == SAME or (k.what == "rows" and k.dim == found.dim) for k in others)
    if value is None or own.shape[found.dim] != value.shape[found.dim] or not alike:
        return None
    along = node.args[1] % value.dim()  # type: ignore[operator]
    return (
        None
        if along == found.dim
        else Found(Kind("rows", found.dim, joined([found, *(k for k in others if k != SAME)])))
    )


def _masked_write(node: fx.Node, kinds: Kinds, target: Kind) -> Found:
    """`x[mask] = y`: the mask chooses within each row."""
    indices = node.args[1] if name_of(node) == "index_put" else None
    masks = [n for n in indices if n is not None] if isinstance(indices, list | tuple) else []
    if target.what != "rows" or len(masks) != 1:
        return NOTHING
    mask, value = tensor_of(masks[0]), tensor_of(node.args[2])
    whole = mask is not None and mask.dtype == torch.bool and kinds.get(masks[0], UNKNOWN) == target
    return Found(target) if whole and value is not None and value.numel() == 1 else NOTHING


def _elsewhere(node: fx.Node) -> bool:
    """True for places along another dim than the first."""
    return isinstance(node.args[1], int) and node.args[1] != 0


def _counted(node: fx.Node, kinds: Kinds) -> Found:
    """How many rows there are of each value."""
    kind, _ = first_of(node, kinds)
    return Found(Kind("sum")) if kind.what == "rows" else MIXED if kind.partial else NOTHING


def _transformed(node: fx.Node, kinds: Kinds) -> Found:
    """A Fourier transform along some dims."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    return MIXED if kind.dim in {d % value.dim() for d in reader(node)("dim")} else Found(kind)


def _kept_parts(node: fx.Node, kinds: Kinds) -> Found:
    """Linear ops of which no more is known."""
    kind, _ = first_of(node, kinds)
    return Found(kind) if kind.partial else NOTHING


def leading(node: fx.Node, kinds: Kinds) -> Found:
    """The trainer's own kernels, which know of documents: what has as many rows as they are given has those."""
    value = tensor_of(node)
    found = [(k, own) for k, own in rows_in(node, kinds) if k.dim == 0]
    if value is None or not found or not value.dim() or value.shape[0] != found[0][1].shape[0]:
        return NOTHING
    return Found(Kind("rows", 0, found[0][0].order))


_REDUCED = (
    *_LINEAR, "amax", "amin", "max", "min", "all", "any", "linalg_vector_norm", "norm", "std", "var", "std_mean",
    "var_mean", "logsumexp", "prod", "median", "nanmedian", "mode", "kthvalue", "argmax", "argmin", "aminmax",
)  # fmt: skip


_ALONG = (
    "_softmax", "_log_softmax", "_safe_softmax", "glu", "cumsum", "cumprod", "sort", "topk", "flip", "logcumsumexp",
    "cummax", "cummin", "roll", "_cummax_helper", "_cummin_helper",
)  # fmt: skip


_SCATTERS = (
    "index_fill", "index_add", "scatter_add", "index_put", "scatter", "scatter_reduce", "index_copy", "index_reduce",
)  # fmt: skip
MATH_RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCED, _reduced),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _normalised),
    **dict.fromkeys(_SCATTERS, _into_places),
    **dict.fromkeys(("bincount", "histc"), _counted),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _transformed),
    **dict.fromkeys(("trace",), _kept_parts),
    "nonzero": found,
    **dict.fromkeys(("bucketize", "searchsorted"), _places_in_table),
    **dict.fromkeys(("bernoulli", "rrelu_with_noise", "multinomial", "log_sigmoid_forward"), _drawn),
    "linalg_cross": _crossed,
}
