"""Which dim of a tensor runs over a rank's rows of the batch, so that ops which mix those rows can be told.

A leaf of the batch is a rank's share. What is computed row by row is a share as well; a sum or mean over the rows is a
part of the whole batch's, and stays one through linear ops; what else reads across the rows, or a part in another way
than linearly, is not what one device computes. Where no rule says more, nothing is known, and nothing is refused.

Legend: "rows" tokens, images, whatever the batch's rules divide.
"""

from collections.abc import Iterator
from math import prod

from torch import fx

from ftrain.graph.loop import is_loop
from ftrain.trace.batch_entry_rules import ENTRY_RULES, matrices
from ftrain.trace.batch_kinds import MIXED, NOTHING, SAME, UNKNOWN, Found, Kind, Kinds, name_of, reader
from ftrain.trace.batch_math_rules import MATH_RULES, elementwise, leading, loss
from ftrain.trace.batch_places import of_columns
from ftrain.trace.batch_shape_rules import SHAPE_RULES, part_of_result
from ftrain.trace.spread import Spreads
from ftrain.trace.spread_ops import CONSTANTS, group_of, is_elementwise, tensor_of

_FARTHEST = 1000  # nodes behind a total that are looked at


class BatchRows:
    """The kinds of a graph's nodes, also of one under way. `spreads`: how they are spread over the mesh."""

    def __init__(self, spreads: Spreads) -> None:
        self._spreads = spreads
        self._known: dict[fx.Node, Found] = {}
        self._noted = set[fx.Node]()  # and what is computed from them, of which the spreads do not know

    def set(self, node: fx.Node, kind: Kind) -> None:
        """Set the kind of an input, or of a node whose op does not determine it."""
        self._known[node] = Found(kind)

    def note(self, node: fx.Node, kind: Kind) -> None:
        """What a node is, though it looks as if all ranks had it alike: after a write into a part of it."""
        self._known[node] = Found(kind)
        self._noted.add(node)

    def of(self, node: fx.Node) -> Found:
        """What is found of a node."""
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [] if current in self._known else [n for n in current.all_input_nodes if n not in self._known]
            stack.extend(missing)
            if not missing:
                self._known.setdefault(current, self._compute(current))
                stack.pop()
        return self._known[node]

    def unclear(self, node: fx.Node) -> bool:
        """True for a node that reads rows, or a part of a sum over them, of whose op no rule says what it makes."""
        if node.op != "call_function" or is_loop(node) or group_of(node) is not None or node.meta.get("purpose"):
            return False
        if tensor_of(node) is None and name_of(node) in ("sym_size", "sym_numel"):
            return False  # a number of rows that depends on the data: what reads it is looked at
        kinds = (self.of(n).kind for n in node.all_input_nodes)
        return self.of(node).kind == UNKNOWN and any(k.own or k.partial for k in kinds)

    def _compute(self, node: fx.Node) -> Found:
        if node in self._known:
            return self._known[node]
        spread = self._spreads.of(node)
        if not self._noted.isdisjoint(node.all_input_nodes) and node.target not in CONSTANTS:
            self._noted.add(node)
        elif not spread.axes or spread.placement is not None:
            return Found(SAME)
        if node.op != "call_function" or is_loop(node) or group_of(node) is not None or node.meta.get("purpose"):
            return NOTHING
        kinds = {n: self._known[n].kind for n in node.all_input_nodes}
        if not any(k.own or k.partial for k in kinds.values()):
            return NOTHING
        found = by_rule(node, kinds)
        value = tensor_of(node)
        kind = found.kind
        if kind.what == "rows" and (value is None or kind.dim >= value.dim()):
            return Found(UNKNOWN, found.mixes)
        return found


def by_rule(node: fx.Node, kinds: Kinds) -> Found:
    """What a node with these kinds of inputs is, by the rule of its op."""
    if getattr(node.target, "__name__", "") == "getitem":
        return part_of_result(node, kinds)
    name = name_of(node)
    if node.args and isinstance(node.args[0], fx.Node) and kinds[node.args[0]].what in ("found", "places"):
        return of_columns(node, kinds)
    if reader(node)("reduction") is not None:
        return loss(node, kinds)
    rule = SHAPE_RULES.get(name) or MATH_RULES.get(name) or ENTRY_RULES.get(name)
    if rule is not None:
        return rule(node, kinds)
    if is_elementwise(node.target):
        return elementwise(node, kinds)
    if any(k.partial for k in kinds.values()):
        return MIXED
    if name.startswith(("linalg_", "_linalg_")):
        return matrices(node, kinds)
    return leading(node, kinds) if str(node.target).startswith("ftrain") else NOTHING


def summed(total: fx.Node, rows: BatchRows) -> Iterator[int]:
    """The numbers of elements of the values, and of their rows, that a sum over rows was made of."""
    seen, stack = {total}, [total]
    while stack and len(seen) < _FARTHEST:
        node = stack.pop()
        value, kind = tensor_of(node), rows.of(node).kind
        if value is not None and kind.what == "rows" and all(isinstance(n, int) for n in value.shape):
            yield prod(value.shape)
            yield value.shape[kind.dim]
        kinds = ("rows", "sum", "mean")
        found = [n for n in node.all_input_nodes if n not in seen and rows.of(n).kind.what in kinds]
        seen.update(found)
        stack.extend(found)
