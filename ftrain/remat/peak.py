"""The peak of a graph for many sets of recomputed nodes, without building the graphs.

Walks the order that `remat.policy.recompute` would give (copies just before their first use in the backward) over plain
integers. Which memory counts is what `pieces.Pieces` says of the original graph. Added here is only which copy of a
piece a recomputed node or a tensor from the host begins. `liveness.plan_memory` of the real graph agrees.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from torch import fx

from ftrain.analysis.pieces import Pieces, sweep


class Step(NamedTuple):
    """A node: the nodes it reads, its pieces of memory (number, bytes), whether it is a forward op, and for each piece
    the read that it is a view of, as (position among the reads, position among that node's pieces), or None.
    """

    reads: tuple[int, ...]
    storages: tuple[tuple[int, int], ...]
    forward: bool
    views: tuple[tuple[int, int] | None, ...]


class CopySlots(NamedTuple):
    """Where the copies of an offloaded node are placed, by numbers of nodes.

    The copy to the host starts right after `start` and is waited for right after `wait`. The copy back starts right
    before `fetch` and is waited for right before `arrive`.
    """

    start: int
    wait: int
    fetch: int
    arrive: int


Lives = tuple[int, ...]
_NOWHERE: Mapping[int, CopySlots] = MappingProxyType({})


class PeakModel:
    """The nodes of a graph as numbers. `donated`: from names of placeholders to the outputs written over them;
    `round_to`: bytes to which sizes are rounded.

    A forward node runs at most twice, so a piece of memory has at most two lives: number `2 piece` of the original, and
    `2 piece + 1` of the copy. A view shares the life of its argument.
    """

    def __init__(self, module: fx.GraphModule, donated: dict[str, int], *, round_to: int = 1) -> None:
        pieces = Pieces.of(module, round_to=round_to, donated=donated)
        self.nodes = list(pieces.nodes)
        self.index = {n: i for i, n in enumerate(self.nodes)}
        results = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        self._results = [self.index[r] for r in results if isinstance(r, fx.Node)]
        self._bytes, self._workspace = np.repeat(pieces.device, 2), pieces.workspace
        self.steps: list[Step] = []
        self._lives: list[Lives] = []
        for node, made in zip(self.nodes, pieces.made, strict=True):
            step = self._step(node, tuple((p, int(pieces.sizes[p])) for p in made))
            self.steps.append(step)
            self._lives.append(_lives(step, [self._lives[u] for u in step.reads], copy=0))
        self._touches = [
            tuple({*mine, *(life for u in step.reads for life in self._lives[u])})
            for mine, step in zip(self._lives, self.steps, strict=True)
        ]

    def _step(self, node: fx.Node, storages: tuple[tuple[int, int], ...]) -> Step:
        reads = tuple(self.index[p] for p in node.all_input_nodes)
        seen = [(piece, (r, j)) for r, u in enumerate(reads) for j, (piece, _) in enumerate(self.steps[u].storages)]
        first = dict(reversed(seen))
        forward = node.op == "call_function" and node.meta.get("phase") == "forward"
        return Step(reads, storages, forward, tuple(first.get(piece) for piece, _ in storages))

    def peak(self, recomputed: Collection[int], places: Mapping[int, CopySlots] = _NOWHERE) -> tuple[int, int]:
        """Bytes at the peak beyond the arguments, and the node where it is, if the nodes `recomputed` run twice and
        those of `places` come back from the host. An offloaded node is fetched before it is first needed.
        """
        runs: list[int] = []
        last = [-1] * len(self._bytes)
        first = [0] * len(self._bytes)
        copied: dict[int, Lives] = {}
        moved: dict[int, Lives] = {}  # nodes of the backward that are views of copies
        left, fetched = _by_node(places)

        def run(v: int, mine: Lives, touched: Collection[int]) -> None:
            at = len(runs)
            runs.append(v)
            for life in mine:
                if last[life] < 0:
                    first[life] = at
            for life in touched:
                last[life] = at
            for u in left.pop(v, ()):
                for life in self._lives[u]:
                    last[life] = at

        def fetch(u: int) -> None:
            copied[u] = tuple(2 * piece + 1 for piece, _ in self.steps[u].storages)
            for life in copied[u]:
                first[life] = last[life] = len(runs)

        def seen(u: int) -> Lives:
            return copied[u] if u in copied else moved.get(u, self._lives[u])

        for v, step in enumerate(self.steps):
            for u in fetched.get(v, ()):
                fetch(u)
            if step.forward or not any(u in recomputed or u in moved or u in places for u in step.reads):
                run(v, self._lives[v], self._touches[v])
                continue
            for c in self._chain([u for u in step.reads if u in recomputed and u not in copied], recomputed, copied):
                reads = [seen(u) for u in self.steps[c].reads]
                copied[c] = _lives(self.steps[c], reads, copy=1)
                run(c, copied[c], {*copied[c], *(life for read in reads for life in read)})
            reads = [seen(u) for u in step.reads]
            mine = _lives(step, reads, copy=0)
            if mine != self._lives[v]:
                moved[v] = mine
            run(v, mine, {*mine, *(life for read in reads for life in read)})
        for result in self._results:
            for life in moved.get(result, self._lives[result]):
                last[life] = len(runs)
        return self._sweep(runs, np.array(first), np.array(last))

    def _chain(self, wanted: list[int], recomputed: Collection[int], copied: Collection[int]) -> list[int]:
        found: set[int] = set()
        stack = wanted
        while stack:
            v = stack.pop()
            if v in recomputed and v not in copied and v not in found:
                found.add(v)
                stack.extend(self.steps[v].reads)
        return sorted(found)

    def _sweep(self, runs: list[int], first: np.ndarray, last: np.ndarray) -> tuple[int, int]:
        lived = last >= 0
        live = sweep(first[lived], last[lived], self._bytes[lived], len(runs)) + self._workspace[runs]
        where = int(live.argmax())
        return int(live[where]), runs[where]


def _by_node(places: Mapping[int, CopySlots]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The offloaded nodes by the node after which the device drops them, and by the node before which it fetches
    them.
    """
    left: dict[int, list[int]] = {}
    fetched: dict[int, list[int]] = {}
    for u, place in places.items():
        left.setdefault(place.wait, []).append(u)
        fetched.setdefault(place.fetch, []).append(u)
    return left, fetched


def _lives(step: Step, reads: list[Lives], *, copy: int) -> Lives:
    return tuple(
        2 * piece + copy if view is None else reads[view[0]][view[1]]
        for (piece, _), view in zip(step.storages, step.views, strict=True)
    )
