"""What a value of a rank's graph is of the batch: equal on all ranks, a rank's share of its rows, or a part of a sum.

Legend: "rows" tokens, images, whatever the batch's rules divide.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from ftrain.graph.op_effects import argument_reader
from ftrain.trace.spread_ops import tensor_of


class Kind(NamedTuple):
    """What a value is of the batch.

    - `what`: "same" on all ranks; "rows", a rank's share along `dim`; "mean", whose average over ranks is the whole
      batch's; "sum", whose sum (or average, of unequal shares) over ranks is; "found", what `nonzero` gives of rows
      along `dim`, and "places", the column of it that says which rows; "unknown".
    - `order`: of rows, "tokens" or "rows" where the shares of all ranks, joined by that rule, are the batch's; the name
      of a part, for some of them; "own" and a name, for those that the data choose; else "". Of places, the number of
      rows, their order, and that of the rows chosen.
    """

    what: str
    dim: int = 0
    order: str = ""

    @property
    def partial(self) -> bool:
        """True for a part of a sum or mean over the whole batch."""
        return self.what in ("sum", "mean")

    @property
    def ordered(self) -> bool:
        """True for rows of which the shares of all ranks, joined, are the batch's."""
        return self.order in ("tokens", "rows")

    @property
    def part(self) -> bool:
        """True for some of a rank's rows, chosen by their places."""
        return bool(self.order) and not self.ordered and not self.order.startswith("own ")

    @property
    def own(self) -> bool:
        """True for what is another on each rank: its rows, and places among them."""
        return self.what in ("rows", "found", "places")


SAME, UNKNOWN = Kind("same"), Kind("unknown")


class Found(NamedTuple):
    """What a node is, and whether it is so by mixing rows of which a rank has only its share."""

    kind: Kind
    mixes: bool = False


MIXED = Found(UNKNOWN, mixes=True)
NOTHING = Found(UNKNOWN)
Kinds = dict[fx.Node, Kind]
"""The kinds of a node's inputs."""
Rule = Callable[[fx.Node, Kinds], Found]
"""What a node of one op is, from the kinds of its inputs."""


def name_of(node: fx.Node) -> str:
    """The name of an op without its library and the mark of writing."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.split("::")[-1].rstrip("_")


def reader(node: fx.Node) -> Callable[[str], Any]:
    """A function from an argument's name to its value, None where the op has no such argument."""
    if getattr(node.target, "_schema", None) is None:
        return lambda _: None
    return argument_reader(node.target, node.args, node.kwargs)  # type: ignore[arg-type]


def first_of(node: fx.Node, kinds: Kinds) -> tuple[Kind, torch.Tensor]:
    """The kind and value of the first argument."""
    source = node.args[0]
    value = tensor_of(source)
    return (UNKNOWN, torch.empty(0)) if value is None else (kinds.get(source, UNKNOWN), value)  # type: ignore[arg-type]


def rows_in(node: fx.Node, kinds: Kinds) -> Iterator[tuple[Kind, torch.Tensor]]:
    """The inputs, of any shape, that are a rank's rows."""
    for source in node.all_input_nodes:
        value = tensor_of(source)
        if kinds[source].what == "rows" and value is not None:
            yield kinds[source], value


def joined(rows: list[Kind]) -> str:
    """The order of what is made of several row by row."""
    orders = {k.order for k in rows}
    return orders.pop() if len(orders) == 1 else ""


def own_order(chooser: fx.Node) -> str:
    """The order of the rows that this node, a mask or what finds places, chooses."""
    return f"own {chooser}"


_FILLS = {"full": "fill_value", "new_full": "fill_value", "full_like": "fill_value", "scalar_tensor": "s"}


def number_in(node: fx.Node) -> float | None:
    """The number that a node of one element is known to have: noted in its `meta`, or filled in; else None."""
    while "number" not in node.meta and name_of(node) == "_to_copy":
        node = node.args[0]  # type: ignore[assignment]
    filled = _FILLS.get(name_of(node))
    number = node.meta.get("number") if filled is None else reader(node)(filled)
    return float(number) if isinstance(number, int | float) else None
