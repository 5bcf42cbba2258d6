"""One pass for all overlap: collectives start early and are waited for late, within a bound of memory.

The graph is run on paper, on two streams: compute, one node after the other, and communication, one collective after
the other. Whenever the link is idle, the next collectives in the graph's order are looked at, and the first whose
inputs can be had at once is started. Where compute would have to wait, nodes that need not wait are taken first. That
gives, without special cases, prefetch of parameters in forward and backward, exchanges of attention under the
projections that do not need them, and experts' exchanges under shared experts and other parts of the tokens.

How far ahead messages may get is bounded by the memory that the step leaves free. More is not always better (a large
gather that is not urgent keeps the link from what is), so a few bounds are tried, and the fastest order is taken.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ftrain.analysis.communication import node_sends
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.pieces import NOT_DONATED, Pieces, Walk
from ftrain.analysis.simulate import Costs, OneLink, Sent, Streams, simulate
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.order import reorder
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh

_AHEAD = 12  # collectives that are looked at when the link is idle
_WINDOW = 400  # how far ahead, in nodes, compute is fetched from to fill a wait
_CLOSURE = 24  # nodes that may be run early to have a collective's inputs
_TRIED = (0, 1, 4, 16)  # times the two largest results of collectives: the memory to be ahead by


class Flight(NamedTuple):
    """One collective: what it is for, the parameter path, bytes that a rank sends; microseconds on the clock of the
    run on paper when it starts, ends, and is waited for; and how long compute then stands still.
    """

    name: str
    purpose: str
    path: str
    bytes: int
    start: float
    end: float
    awaited: float
    exposed: float
    over: str


@dataclass(frozen=True)
class Schedule:
    """All collectives of a step in order of their start (of a loop those of its first round); microseconds of compute,
    of communication, and of the part of it during which compute stands still, with all rounds of loops.
    """

    flights: list[Flight]
    compute: float
    communication: float
    exposed: float

    def table(self) -> str:
        """A line per collective, and the sums."""
        lines = [f"{'start us':>10} {'us':>9} {'exposed':>9} {'MB':>9}  {'purpose':18} overlaps"]
        for f in self.flights:
            took, mb = f.end - f.start, f.bytes / 1e6
            lines.append(
                f"{f.start:10.1f} {took:9.1f} {f.exposed:9.1f} {mb:9.3f}  {f.purpose:18} {f.over or '-'}  ({f.path})"
            )
        lines.append(
            f"compute {self.compute:.0f} us, communication {self.communication:.0f} us, exposed {self.exposed:.0f} us"
        )
        return "\n".join(lines)


def overlap(
    module: fx.GraphModule,
    mesh: Mesh,
    *,
    times: OpTimes,
    link: Link,
    within: int | None = None,
    score: Callable[[fx.GraphModule], float] | None = None,
    donated: Mapping[str, int] = NOT_DONATED,
) -> None:
    """Reorder the graph so that communication hides behind compute; no value changes.

    `within`: bytes beyond the arguments that the step may take; what the graph leaves of them is what messages may be
    ahead by: several bounds up to that are tried, and the fastest order by `score` (default: the run on paper with
    `link` for all messages) is taken, so that more bytes never give a longer step. None: one bound, a tenth of the
    graph's peak, or the two largest results of collectives. `donated`: the outputs that will be written over
    placeholders (see `Pieces.of`). Bodies of loops are treated alike.
    """
    pieces = Pieces.of(module, donated=donated)
    for i, node in enumerate(pieces.nodes):
        if is_loop(node):
            inner = None if within is None else within - int(pieces.live[i])
            overlap(loop_body(node), mesh, times=times, link=link, within=inner, score=score)
    if not any(n.target in COLLECTIVES for n in module.graph.nodes):
        return
    if pieces.bodies:  # which have another order now
        pieces = Pieces.of(module, donated=donated)
    costs = Costs.of(module, times, OneLink(mesh, link))
    peak = pieces.peak
    sent = [p for n, made in zip(pieces.nodes, pieces.made, strict=True) if n.target in COLLECTIVES for p in made]
    two = sum(sorted(pieces.sizes[sent].tolist())[-2:])
    if within is None:
        reorder(_Scheduler(module, pieces, costs, peak + max(peak // 10, two)).run())
    else:
        # what is tried of a smaller budget is tried of every larger one
        bounds = [peak + n * two for n in _TRIED if n == 0 or n * two <= within - peak]
        reorder(_fastest(module, pieces, costs, bounds, score or (lambda m: simulate(m, costs).tally.step)))
    module.graph.lint()
    module.recompile()


def _fastest(
    module: fx.GraphModule,
    pieces: Pieces,
    costs: Costs,
    bounds: Sequence[int],
    score: Callable[[fx.GraphModule], float],
) -> list[fx.Node]:
    """The order of the bound that gives the shortest step; of bounds that refuse nothing one is tried."""
    best, least = list(module.graph.nodes), float("inf")
    for bound in bounds:
        scheduler = _Scheduler(module, pieces, costs, bound)
        order = scheduler.run()
        reorder(order)
        took = score(module)
        if took < least:
            best, least = order, took
        if not scheduler.was_refused:
            break
    return best


def simulate_schedule(module: fx.GraphModule, mesh: Mesh, *, times: OpTimes, link: Link) -> Schedule:
    """Run the graph on paper in the order that it has, with one link for all messages."""
    found = simulate(module, Costs.of(module, times, OneLink(mesh, link)))
    tally, flights = found.tally, [_flight(message, mesh) for message in found.sent]
    return Schedule(flights, tally.compute, tally.communication, tally.exposed)


def _flight(message: Sent, mesh: Mesh) -> Flight:
    beside: dict[str, float] = {}
    for node, took in message.ran[message.beside]:
        label = f"{node.meta.get('purpose') or node.meta.get('path') or node.name}"
        beside[label] = beside.get(label, 0.0) + took
    most = sorted(beside.items(), key=lambda item: -item[1])[:2]
    meta = message.node.meta
    return Flight(
        name=message.node.name,
        purpose=meta.get("purpose", ""),
        path=meta.get("path") or "",
        bytes=node_sends(message.node, mesh),
        start=message.start,
        end=message.end,
        awaited=message.awaited,
        exposed=message.stall,
        over=", ".join(name for name, _ in most),
    )


class _Scheduler:
    """List scheduling in the graph's own order, but for what fills waits and what the idle link can start."""

    def __init__(self, module: fx.GraphModule, pieces: Pieces, costs: Costs, bound: int) -> None:
        self._nodes, self._output = pieces.nodes, module.graph.output_node()
        self._index = {n: i for i, n in enumerate(self._nodes)}
        self._streams, self._memory, self._bound = Streams(costs), Walk(pieces), bound
        self._missing = [len(n.all_input_nodes) for n in self._nodes]
        self._starts = [i for i, n in enumerate(self._nodes) if n.target in COLLECTIVES]
        self.was_refused = False
        """Whether a larger bound of memory would have given another order."""
        self._ready: list[int] = []
        self._done = [False] * len(self._nodes)
        self._order: list[fx.Node] = []
        self._next = 0

    def run(self) -> list[fx.Node]:
        """The new order, the output last."""
        for i, count in enumerate(self._missing):
            if count == 0:
                heapq.heappush(self._ready, i)
        for i, node in enumerate(self._nodes):
            if node.op == "placeholder":  # their order is that of the arguments
                self._emit(i)
        while len(self._order) < len(self._nodes):
            chosen = self._nodes[self._choose()]
            # The link must not fall idle while this node runs: nothing can be started before its end. A loop waits for
            # whatever is under way.
            while not is_loop(chosen) and self._streams.sent <= self._streams.until(chosen) and self._start_one():
                pass
            self._emit(self._choose())
        return [*self._order, self._output]

    def _choose(self) -> int:
        """The first ready node; if it would wait, one further on that need not, or whose message comes first."""
        while self._done[self._ready[0]]:
            heapq.heappop(self._ready)
        first = self._ready[0]
        if not self._waits(first):
            return first
        near = [i for i in sorted(self._ready) if i <= first + _WINDOW and not self._done[i]]
        for i in near:
            if not self._waits(i) and self._nodes[i].target not in COLLECTIVES and self._allows(i):
                return i
        return min((i for i in near if self._waits(i)), key=lambda i: self._streams.until(self._nodes[i]))

    def _waits(self, i: int) -> bool:
        return self._nodes[i].target is WAIT and self._streams.until(self._nodes[i]) > self._streams.clock

    def _start_one(self) -> bool:
        """Start the first of the next collectives whose inputs are there, or can be made from what is there."""
        while self._next < len(self._starts) and self._done[self._starts[self._next]]:
            self._next += 1
        seen = 0
        for i in self._starts[self._next :]:
            if self._done[i]:
                continue
            seen += 1
            if seen > _AHEAD:
                break
            closure = self._closure(i)
            if closure is not None and self._allows(*closure, i):
                for node in [*closure, i]:
                    self._emit(node)
                return True
        return False

    def _allows(self, *nodes: int) -> bool:
        """True if these nodes may run now: with their workspaces they keep within the bound, and what they make does
        without counting on what dies among them, since a message reads its input until it has been sent.
        """
        memory = self._memory
        allowed = max(memory.peak_of(*nodes), memory.live + memory.allocated_by(*nodes)) <= self._bound
        self.was_refused |= not allowed
        return allowed

    def _closure(self, i: int) -> list[int] | None:
        """The nodes to run for a collective's inputs, in order; None if they are many, or would wait."""
        needed: set[int] = set()
        stack = [self._index[p] for p in self._nodes[i].all_input_nodes]
        while stack:
            j = stack.pop()
            if self._done[j] or j in needed:
                continue
            node = self._nodes[j]
            if node.target in COLLECTIVES or is_loop(node) or self._waits(j) or len(needed) >= _CLOSURE:
                return None
            if node.target is WAIT and not self._streams.was_sent(node.args[0]):  # type: ignore[arg-type]
                return None
            needed.add(j)
            stack += [self._index[p] for p in node.all_input_nodes]
        return sorted(needed)

    def _emit(self, i: int) -> None:
        if self._done[i]:
            return
        node = self._nodes[i]
        self._streams.run(node)
        self._memory.run(i)
        self._done[i] = True
        self._order.append(node)
        for user in node.users:
            if user in self._index:
                j = self._index[user]
                self._missing[j] -= 1
                if self._missing[j] == 0:
                    heapq.heappush(self._ready, j)
