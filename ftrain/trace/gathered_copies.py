"""Gathered copies of arrays that ranks hold in pieces: each made once, and views of them that a write must not miss."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from ftrain import tree
from ftrain.graph.source import user_source
from ftrain.graph.torch_memory import storage_id
from ftrain.graph.torch_private import node_of, tracing_graph


class _ViewOfCopy(NamedTuple):
    """A view of a gathered array: the last node before it, the memory of the piece and of the copy, the user's line."""

    since: fx.Node
    source: int
    copy: int
    line: str


class GatheredCopies:
    """The copies of one trace, and the views of them that the step has taken."""

    def __init__(self) -> None:
        self._views = list[_ViewOfCopy]()
        self._gathered: dict[fx.Node, tuple[Tensor, fx.Node]] = {}

    @property
    def empty(self) -> bool:
        """True if nothing was gathered."""
        return not self._gathered

    def of(self, node: fx.Node) -> Tensor | None:
        """The copy, of any shape, of the array that a node is a piece of; None after a write, and if there is none."""
        known = self._gathered.get(node)
        return None if known is None or any(True for _ in writes_since(known[1])) else known[0]

    def add(self, node: fx.Node, gathered: Tensor, at: fx.Node) -> None:
        """Add the copy `gathered`, of any shape, made by the node `at` from the piece `node`."""
        self._gathered[node] = gathered, at

    def discard(self, erased: Collection[fx.Node]) -> None:
        """Discard what the erased nodes made."""
        gone = set(erased)
        self._gathered = {n: known for n, known in self._gathered.items() if not {n, known[1]} & gone}
        self._views = [view for view in self._views if view.since not in gone]

    def written(self, target: Tensor, value: Any) -> Tensor | None:
        """The gathered copy of `target`, if `value` is a view of it, else None.

        `target[:2] += 1` writes into a view and then sets it. All writes into the copy reach the target by this
        assignment, so they are not lost.
        """
        known = self._gathered.get(node_of(target))  # type: ignore[arg-type]
        if known is None or not isinstance(value, Tensor) or storage_id(value) != storage_id(known[0]):
            return None
        if any(memory == storage_id(target) for _, memory in writes_since(known[1])):
            return None
        graph = tracing_graph()
        assert graph is not None
        copy, at = storage_id(known[0]), last_node(graph)
        self._views = [v._replace(since=at) if v.copy == copy else v for v in self._views]
        return known[0]

    def note_views(self, result: Any, args: Any, kwargs: Any, gathered: tuple[Any, Any]) -> None:
        """Record that a result is a view of the gathered copy of a piece."""
        looked_at = {storage_id(t) for t in tensors_in(result)}
        for before, after in zip(tensors_in((args, kwargs)), tensors_in(gathered), strict=True):
            node = node_of(after)
            if after is not before and storage_id(after) in looked_at and node is not None:
                view = _ViewOfCopy(last_node(node.graph), storage_id(before), storage_id(after), str(user_source()))
                self._views.append(view)

    def require_no_lost_writes(self, result: Any) -> None:
        """ValueError, with both lines, for a write that must reach a view of a gathered array, or come from one.

        `result`: the step's result.
        """
        returned = {storage_id(t) for t in tensors_in(tree.leaves(result))}
        for view in self._views:
            for written, other in ((view.source, view.copy), (view.copy, view.source)):
                write = next((n for n, memory in writes_since(view.since) if memory == written), None)
                if write is not None and (other in returned or _is_read_after(write, other)):
                    raise ValueError(
                        f"{write.meta.get('source')}: writes into a tensor of which {view.line} takes a view across a "
                        "dim that is divided among ranks: the view is of a gathered copy, so make a new value, e.g. "
                        "x = x.mul(...), or take the view after the write"
                    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors, of any shape, among arguments: in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def last_node(graph: fx.Graph) -> fx.Node:
    """The last node of a graph under construction."""
    return next(iter(reversed(graph.nodes)))


def _memory(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return storage_id(value) if isinstance(value, Tensor) else None


def writes_since(node: fx.Node) -> Iterator[tuple[fx.Node, int | None]]:
    """The nodes after a node that write, each with the memory that it writes into."""
    node = node.next
    while node.op != "root":
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            given = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
            for argument in schema.arguments:
                value = given.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for written in value if isinstance(value, list | tuple) else [value]:
                        yield node, _memory(written)
        node = node.next


def _is_read_after(node: fx.Node, memory: int) -> bool:
    node = node.next
    while node.op != "root":
        if any(_memory(read) == memory for read in node.all_input_nodes):
            return True
        node = node.next
    return False
