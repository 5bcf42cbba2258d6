"""The pieces of memory of a graph: which node allocates each piece, which nodes use it, and which pieces count.

This file holds all rules of the memory plan. A piece is a storage; views share it. A piece is live from the first node
that uses it to the last, because the generated program drops each variable right after its last use. Results stay live
to the end. The memory that an op allocates only while it runs is its workspace; the workspace of a loop is the peak of
one iteration of its body.

There are two ways to sum the live bytes, with equal results: `sweep` for a complete order, `Walk` for an order that is
built node by node.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Self

import numpy as np
import torch
from torch import Tensor, fx

from ftrain.analysis.op_rules import WORKSPACE
from ftrain.analysis.workspace import aten_workspace
from ftrain.graph.aliasing import storage
from ftrain.graph.in_place_ops import IN_PLACE_OPS, PASSED_ON
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import sized
from ftrain.graph.torch_memory import storage_id
from ftrain.kernels.offload import offload_start, offload_wait

Workspace = Callable[[fx.Node], int]
"""From a node to the bytes of its op's workspace."""
NOT_DONATED: Mapping[str, int] = MappingProxyType({})
"""No donated placeholders."""


def storages_of(node: fx.Node) -> list[tuple[int, int]]:
    """Identity and bytes of each storage that a node's value uses: one pair per tensor of the value."""
    value, with_sizes = node.meta.get("val"), sized(node)
    pairs = zip(*([v] if not isinstance(v, list | tuple) else v for v in (value, with_sizes)), strict=True)
    return [(storage_id(v), int(s.untyped_storage().nbytes())) for v, s in pairs if isinstance(v, Tensor)]


def op_workspace(node: fx.Node) -> int:
    """Bytes that the op of a node allocates beyond its outputs while it runs; 0 for a loop."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), sized)
    rule = WORKSPACE.get(node.target._schema.name)
    return int(rule(*args, **kwargs)) if rule is not None else aten_workspace(node.target, args, kwargs)


def sweep(first: np.ndarray, last: np.ndarray, sizes: np.ndarray, moments: int) -> np.ndarray:
    """The bytes live at each of `moments` moments, int64 `[moments]`.

    `first`, `last`, `sizes`: by piece, the first and last moment (inclusive) at which it is live, and its bytes.

    >>> import numpy as np
    >>> from ftrain.analysis.pieces import sweep
    >>> sweep(np.array([0, 1]), np.array([1, 2]), np.array([10, 5]), 4).tolist()
    [10, 15, 5, 0]
    """
    change = np.zeros(moments + 2, np.int64)
    np.add.at(change, first, sizes)
    np.add.at(change, last + 1, -sizes)
    return np.cumsum(change)[:moments]


@dataclass(frozen=True)
class Pieces:
    """The pieces of memory of one graph. Pieces and nodes are identified by their number.

    By piece, int64 arrays except `owners` and `results`:

    - `owners`: the node that allocates it.
    - `sizes`: its bytes, rounded as the allocator does.
    - `device`: the bytes that count. 0 for arguments, captured tensors, memory of donated arguments that is reused, and
      tensors on the host.
    - `host`: the bytes that an offloaded tensor takes on the host.
    - `results`: the pieces that outlive the graph.

    By node, in the order of the graph, without the output:

    - `nodes`: the node. `made`: the piece of each tensor of its value. `touched`: the pieces that it makes or reads.
    - `workspace`: bytes.
    - `bodies`: the pieces of a loop's body, by the number of the loop's node.
    """

    nodes: tuple[fx.Node, ...]
    owners: tuple[fx.Node, ...]
    sizes: np.ndarray
    device: np.ndarray
    host: np.ndarray
    results: frozenset[int]
    made: tuple[tuple[int, ...], ...]
    touched: tuple[tuple[int, ...], ...]
    workspace: np.ndarray
    bodies: Mapping[int, "Pieces"]

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        *,
        round_to: int = 1,
        workspace: Workspace = op_workspace,
        donated: Mapping[str, int] = NOT_DONATED,
    ) -> Self:
        """The pieces of a graph.

        - `round_to`: the granularity of the allocator in bytes.
        - `workspace`: the workspace of an op. It is not called for loops, whose bodies are analyzed.
        - `donated`: by the name of a placeholder, the position of the output that `passes.donate` will write over it.
          Memory of these outputs does not count. Empty for a graph that has these writes already.
        """
        nodes = tuple(n for n in module.graph.nodes if n.op != "output")
        numbers: dict[int, int] = {}
        owners, sizes, made = list[fx.Node](), list[int](), list[tuple[int, ...]]()
        for node in nodes:
            found = storages_of(node)
            for memory, size in found:
                if memory not in numbers:
                    numbers[memory] = len(numbers)
                    owners.append(node)
                    sizes.append(size)
            made.append(tuple(numbers[memory] for memory, _ in found))
        index = {n: i for i, n in enumerate(nodes)}
        touched = [
            tuple(dict.fromkeys([*mine, *(p for u in node.all_input_nodes for p in made[index[u]])]))
            for node, mine in zip(nodes, made, strict=True)
        ]
        bodies = {
            i: cls.of(loop_body(n), round_to=round_to, workspace=workspace) for i, n in enumerate(nodes) if is_loop(n)
        }
        free = {numbers[memory] for memory in _written_over(module, donated) if memory in numbers}
        away = {p for node, mine in zip(nodes, made, strict=True) if on_host(node) for p in mine}
        given = {
            p for node, mine in zip(nodes, made, strict=True) if node.op in ("placeholder", "get_attr") for p in mine
        }
        free |= away | given
        rounded = -(-np.array(sizes, np.int64) // round_to) * round_to
        results = module.graph.output_node().all_input_nodes
        return cls(
            nodes=nodes,
            owners=tuple(owners),
            sizes=rounded,
            device=np.array([0 if p in free else size for p, size in enumerate(rounded)], np.int64),
            host=np.array([size if p in away else 0 for p, size in enumerate(sizes)], np.int64),
            results=frozenset(p for r in results for p in made[index[r]]),
            made=tuple(made),
            touched=tuple(touched),
            workspace=np.array(
                [bodies[i].peak if i in bodies else _workspace_of(n, workspace) for i, n in enumerate(nodes)], np.int64
            ),
            bodies=bodies,
        )

    @cached_property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """By piece, the first and the last node that use it, in the graph's order; for a result, the output is last."""
        first, last = np.zeros(len(self.owners), np.int64), np.zeros(len(self.owners), np.int64)
        for i in range(len(self.nodes) - 1, -1, -1):
            first[list(self.touched[i])] = i
        for i, pieces in enumerate(self.touched):
            last[list(pieces)] = i
        last[list(self.results)] = len(self.nodes)
        return first, last

    def sum_live(self, sizes: np.ndarray) -> np.ndarray:
        """By node, in the graph's order: the sum of `sizes`, int64 by piece, over the pieces live while it runs."""
        return sweep(*self.spans, sizes, len(self.nodes))

    @cached_property
    def live(self) -> np.ndarray:
        """By node, in the graph's order: live bytes beyond the arguments while it runs, without its workspace."""
        return self.sum_live(self.device)

    @property
    def total(self) -> np.ndarray:
        """By node, in the graph's order: live bytes beyond the arguments while it runs, workspace included."""
        return self.live + self.workspace

    @property
    def peak(self) -> int:
        """The most live bytes beyond the arguments at any node, workspace included."""
        return int(self.total.max(initial=0))

    @cached_property
    def live_on_host(self) -> np.ndarray:
        """By node: bytes of offloaded tensors on the host while it runs; a loop includes one iteration of its body."""
        inner = [self.bodies[i].live_on_host.max(initial=0) if i in self.bodies else 0 for i in range(len(self.nodes))]
        return self.sum_live(self.host) + np.array(inner, np.int64)

    def live_at(self, node: int) -> list[int]:
        """The pieces that count and are live while a node runs, in the graph's order."""
        first, last = self.spans
        return np.flatnonzero((first <= node) & (node <= last) & (self.device > 0)).tolist()


class Walk:
    """Live bytes while the nodes of a graph run in an order that is built node by node. Each node may run once."""

    def __init__(self, pieces: Pieces) -> None:
        self._bytes: list[int] = pieces.device.tolist()
        self._workspace: list[int] = pieces.workspace.tolist()
        self._touched = [[p for p in touched if self._bytes[p]] for touched in pieces.touched]
        self._total = [0] * len(self._bytes)
        for touched in self._touched:
            for p in touched:
                self._total[p] += 1
        for p in pieces.results:
            self._total[p] += 1
        self._left = dict(enumerate(self._total))
        self.live = 0
        """Bytes live now, between two nodes."""
        self.peak = 0
        """The most live bytes so far, workspaces included."""

    def run(self, node: int) -> None:
        """Run a node: update `live` and `peak`."""
        most, self.live = self._run(node, self.live, self._left)
        self.peak = max(self.peak, most)

    def allocated_by(self, *nodes: int) -> int:
        """Bytes of the pieces that these nodes allocate, if they run next."""
        touched = {p for i in nodes for p in self._touched[i]}
        return sum(self._bytes[p] for p in touched if self._left[p] == self._total[p])

    def peak_of(self, *nodes: int) -> int:
        """The most live bytes, workspaces included, while these nodes run next, one after the other."""
        left = {p: self._left[p] for i in nodes for p in self._touched[i]}
        most, live = 0, self.live
        for i in nodes:
            during, live = self._run(i, live, left)
            most = max(most, during)
        return most

    def _run(self, i: int, live: int, left: dict[int, int]) -> tuple[int, int]:
        """Live bytes while a node runs, and after it. `left`: by piece, the number of nodes that will still use it."""
        touched = self._touched[i]
        live += sum(self._bytes[p] for p in touched if left[p] == self._total[p])
        during = live + self._workspace[i]
        for p in touched:
            left[p] -= 1
            if left[p] == 0:
                live -= self._bytes[p]
        return during, live


def on_host(node: fx.Node) -> bool:
    """True for a node whose value is a copy of an offloaded tensor on the host."""
    return node.target in (offload_start, offload_wait)


def _workspace_of(node: fx.Node, workspace: Workspace) -> int:
    return workspace(node) if node.op == "call_function" else 0


def _written_over(module: fx.GraphModule, donated: Mapping[str, int]) -> set[int]:
    """Memory of outputs that will be computed in place of a donated placeholder.

    These are outputs of the update. Outputs of forward and backward are computed elsewhere and copied.
    """
    results = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    new = [results[i] for i in donated.values()]
    made = {n for n in new if isinstance(n, fx.Node) and n.meta.get("phase") == "step"}
    return {s for n in made if (s := storage(n)) is not None} | _never_made(module, made)


def _never_made(module: fx.GraphModule, made: set[fx.Node]) -> set[int]:
    """Memory that ops with an in-place form, and the sums and choices behind them, will never allocate."""
    found: set[int] = set()
    for node in module.graph.nodes if made else ():
        if node.target not in IN_PLACE_OPS:
            continue
        chains = [_chain_of(result) for result in node.users]
        if all(chain[-1] in made for chain in chains):
            found |= {s for n in (node, *(n for chain in chains for n in chain)) for s, _ in storages_of(n)}
    return found


def _chain_of(result: fx.Node) -> list[fx.Node]:
    chain = [result]
    while len(chain[-1].users) == 1 and (user := next(iter(chain[-1].users))).target in PASSED_ON:
        chain.append(user)
    return chain
