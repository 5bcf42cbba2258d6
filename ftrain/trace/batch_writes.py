"""Rows of the batch that are written into a part of another tensor (`out[:, :2] = h`), which has rows from then on."""

import torch
from torch import fx

from ftrain.graph.op_effects import argument_reader
from ftrain.trace.batch_kinds import SAME, Kind, name_of
from ftrain.trace.batch_rows import BatchRows
from ftrain.trace.spread_ops import is_view, tensor_of


def is_write(node: fx.Node) -> bool:
    """True for an op that writes into an argument, other than its shape (`squeeze_`)."""
    if torch.Tag.inplace_view in getattr(node.target, "tags", ()):
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and len(node.args) > 0 and isinstance(node.args[0], fx.Node)


def note_write(node: fx.Node, rows: BatchRows) -> bool:
    """Give the tensors that a write reaches through a view the kind of what is written. True if they cannot have one.

    `node`: any node of a graph under way.
    """
    if not is_write(node):
        return False
    kind, view = rows.of(node).kind, node.all_input_nodes[0]
    if kind.what not in ("rows", "sum", "mean"):
        return False
    while is_view(view.target) and len(view.all_input_nodes) == 1:
        base = view.all_input_nodes[0]
        at = _dim_of_base(view, kind.dim) if kind.what == "rows" else None
        before = rows.of(base).kind
        if before.what == "rows" and before.dim == at:
            return False
        if at is None or before != SAME:
            return True
        kind = Kind("rows", at, kind.order)
        rows.note(base, kind)
        view = base
    return False


def _dim_of_base(view: fx.Node, dim: int) -> int | None:
    """Which dim of the tensor that a view is of its dim is, whole; None where that is not told."""
    base, own, name = tensor_of(view.args[0]), tensor_of(view), name_of(view)
    if base is None or own is None:
        return None
    read = argument_reader(view.target, view.args, view.kwargs)  # type: ignore[arg-type]
    found: int | None = None
    if name in ("slice", "alias", "detach"):
        found = dim
    elif name == "select":
        found = dim + (dim >= (read("dim") % base.dim()))
    elif name == "unsqueeze":
        new = read("dim") % own.dim()
        found = None if new == dim else dim - (dim > new)
    elif name == "permute":
        found = read("dims")[dim] % base.dim()
    elif name == "transpose":
        a, b = read("dim0") % base.dim(), read("dim1") % base.dim()
        found = {a: b, b: a}.get(dim, dim)
    return found if found is not None and base.shape[found] == own.shape[dim] else None
