"""The peak of a graph for many sets of recomputed nodes, without making the graphs.

Walks the order that `remat.recompute` would give (copies just before their first use in the backward) over plain
integers. What it says is checked on the final graph by `liveness.plan_memory`.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import fx

from ftrain.liveness import storages_of, workspace_bytes
from ftrain.passes.aliasing import storage


class Step(NamedTuple):
    """A node: the nodes it reads, its pieces of memory (identity, bytes), and what its op allocates beside them."""

    reads: tuple[int, ...]
    storages: tuple[tuple[int, int], ...]
    workspace: int
    forward: bool


class Run(NamedTuple):
    """A node, or a copy of it, where it runs: `reads` are places in the order of running."""

    node: int
    reads: list[int]


class PeakModel:
    """The nodes of a graph as numbers. `donated` maps names of placeholders to the outputs written over them."""

    def __init__(self, module: fx.GraphModule, donated: dict[str, int], *, round_to: int = 1) -> None:
        self.nodes = [n for n in module.graph.nodes if n.op != "output"]
        self.index = {n: i for i, n in enumerate(self.nodes)}
        results = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        self._results = [self.index[r] for r in results if isinstance(r, fx.Node)]
        self._free = {s for n in self.nodes if n.op in ("placeholder", "get_attr") for s, _ in storages_of(n)}
        new = [results[i] for i in donated.values()]
        made = [n for n in new if isinstance(n, fx.Node) and n.meta.get("phase") == "step"]
        self._free |= {s for n in made if (s := storage(n)) is not None}
        self.steps = [
            Step(
                tuple(self.index[p] for p in n.all_input_nodes),
                tuple((s, -(-size // round_to) * round_to) for s, size in storages_of(n)),
                workspace_bytes(n, round_to=round_to) if n.op == "call_function" else 0,
                n.op == "call_function" and n.meta.get("phase") == "forward",
            )
            for n in self.nodes
        ]

    def peak(self, remade: Collection[int]) -> tuple[int, int]:
        """Bytes at the peak if the forward nodes `remade` are made again for the backward, and the node it is at."""
        order, original = self._order(remade)
        names = self._memory(order)
        last: dict[tuple[int, int], int] = {}
        for at, run in enumerate(order):
            for element in (at, *run.reads):
                last.update(dict.fromkeys(names[element].values(), at))
        for result in self._results:
            last.update(dict.fromkeys(names[original[result]].values(), len(order)))
        return self._sweep(order, names, last)

    def _order(self, remade: Collection[int]) -> tuple[list[Run], dict[int, int]]:
        """All nodes and copies as they run, and the place of each node itself."""
        order: list[Run] = []
        original: dict[int, int] = {}
        copy: dict[int, int] = {}
        for v, step in enumerate(self.steps):
            seen = original
            if not step.forward:
                wanted = [u for u in step.reads if u in remade and u not in copy]
                for c in self._chain(wanted, remade, copy) if wanted else ():
                    order.append(Run(c, [copy[u] if u in copy else original[u] for u in self.steps[c].reads]))
                    copy[c] = len(order) - 1
                seen = {u: copy.get(u, original[u]) for u in step.reads}
            order.append(Run(v, [seen[u] for u in step.reads]))
            original[v] = len(order) - 1
        return order, original

    def _chain(self, wanted: list[int], remade: Collection[int], copy: dict[int, int]) -> list[int]:
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            v = stack.pop()
            if v in remade and v not in copy and v not in found:
                found.add(v)
                stack.extend(self.steps[v].reads)
        return sorted(found)

    def _memory(self, order: list[Run]) -> list[dict[int, tuple[int, int]]]:
        """For each run its pieces of memory, under names that tell copies apart: a view has its argument's."""
        names: list[dict[int, tuple[int, int]]] = []
        for at, run in enumerate(order):
            mine = {}
            for s, _ in self.steps[run.node].storages:
                viewed = next((names[r][s] for r in run.reads if s in names[r]), None)
                mine[s] = viewed if viewed is not None else (s, at)
            names.append(mine)
        return names

    def _sweep(
        self, order: list[Run], names: list[dict[int, tuple[int, int]]], last: dict[tuple[int, int], int]
    ) -> tuple[int, int]:
        expiring: dict[int, list[tuple[int, int]]] = {}
        for name, end in last.items():
            expiring.setdefault(end, []).append(name)
        alive: dict[tuple[int, int], int] = {}
        live = peak = where = 0
        for at, run in enumerate(order):
            step = self.steps[run.node]
            for s, size in step.storages:
                name = names[at][s]
                if name not in alive and s not in self._free:
                    alive[name] = size
                    live += size
            if live + step.workspace > peak:
                peak, where = live + step.workspace, run.node
            for name in expiring.get(at, ()):
                live -= alive.pop(name, 0)
        return peak, where
