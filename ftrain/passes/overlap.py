"""Overlap of communication and compute: start collectives early and wait for them late, within a bound of memory.

This is list scheduling on a simulation with two streams: compute, one node after the other, and communication, one
collective after the other. When the link is idle, the pass looks at the next collectives in the graph's order, and
starts the first whose inputs can be computed at once. Where compute would stall at a wait, nodes that need not wait run
first. Without special cases this prefetches parameters in forward and backward, hides the exchanges of attention behind
independent projections, and hides the exchanges of experts behind shared experts and other chunks of tokens.

Free memory bounds how many messages may start early. A larger bound is not always faster, because a large gather that
is not urgent blocks the link. So the pass tries a few bounds and takes the fastest order.
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

_AHEAD = 12  # collectives to consider when the link is idle
_WINDOW = 400  # nodes after a wait from which compute is taken to fill it
_CLOSURE = 24  # nodes that may run early to compute a collective's inputs
_TRIED = (0, 1, 4, 16)  # bounds beyond the peak, in multiples of the two largest results of collectives


class Message(NamedTuple):
    """One collective of a simulated step.

    - `name`: its node. `purpose`: e.g. "fsdp_gather". `path`: the parameter's. `bytes`: those that one rank sends.
    - `start`, `end`, `awaited`: the times, in microseconds from the start of the step, at which the message starts and
      ends, and at which compute reaches its wait.
    - `exposed`: microseconds that compute then stalls.
    - `overlaps`: the compute that ran most between start and wait, by purpose, path or name.
    """

    name: str
    purpose: str
    path: str
    bytes: int
    start: float
    end: float
    awaited: float
    exposed: float
    overlaps: str


@dataclass(frozen=True)
class Schedule:
    """The simulated schedule of a step.

    - `messages`: all collectives in order of their start; of a loop those of its first iteration.
    - `compute`, `communication`: microseconds, with all iterations of loops.
    - `exposed`: the part of `communication` during which compute stalls.
    """

    messages: list[Message]
    compute: float
    communication: float
    exposed: float

    def table(self) -> str:
        """A text table with a line per collective, and the sums."""
        lines = [f"{'start us':>10} {'us':>9} {'exposed':>9} {'MB':>9}  {'purpose':18} overlaps"]
        for m in self.messages:
            took, mb = m.end - m.start, m.bytes / 1e6
            numbers = f"{m.start:10.1f} {took:9.1f} {m.exposed:9.1f} {mb:9.3f}"
            lines.append(f"{numbers}  {m.purpose:18} {m.overlaps or '-'}  ({m.path})")
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
    """Reorder the graph, in place, so that communication overlaps with compute. No value changes.

    - `times`: microseconds of ops. `link`: the one link of all messages.
    - `within`: bytes beyond the arguments that the step may use. Several bounds up to it are tried, and the fastest
      order is taken, so a larger budget never gives a slower step. None: one bound is used, the graph's peak plus a
      tenth of it or the two largest results of collectives, whichever is more.
    - `score`: microseconds of a graph, to compare orders; by default the simulation with `link`.
    - `donated`: the outputs that will be written over placeholders (see `Pieces.of`).

    Bodies of loops are reordered in the same way.
    """
    pieces = Pieces.of(module, donated=donated)
    for i, node in enumerate(pieces.nodes):
        if is_loop(node):
            inner = None if within is None else within - int(pieces.live[i])
            overlap(loop_body(node), mesh, times=times, link=link, within=inner, score=score)
    if not any(n.target in COLLECTIVES for n in module.graph.nodes):
        return
    if pieces.bodies:  # their order has changed
        pieces = Pieces.of(module, donated=donated)
    costs = Costs.of(module, times, OneLink(mesh, link))
    peak = pieces.peak
    sent = [p for n, made in zip(pieces.nodes, pieces.made, strict=True) if n.target in COLLECTIVES for p in made]
    two = sum(sorted(pieces.sizes[sent].tolist())[-2:])
    if within is None:
        reorder(_Scheduler(module, pieces, costs, peak + max(peak // 10, two)).run())
    else:
        # every bound that is tried with a smaller budget is also tried with a larger one
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
    """The order of the bound with the fastest step. Bounds that are larger than any order needs are not tried."""
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
    """Simulate a graph in its current order, with one `link` for all messages and `times` for all ops."""
    found = simulate(module, Costs.of(module, times, OneLink(mesh, link)))
    tally, messages = found.tally, [_message(sent, mesh) for sent in found.sent]
    return Schedule(messages, tally.compute, tally.communication, tally.exposed)


def _message(sent: Sent, mesh: Mesh) -> Message:
    beside: dict[str, float] = {}
    for node, took in sent.ran[sent.beside]:
        label = f"{node.meta.get('purpose') or node.meta.get('path') or node.name}"
        beside[label] = beside.get(label, 0.0) + took
    most = sorted(beside.items(), key=lambda item: -item[1])[:2]
    meta = sent.node.meta
    return Message(
        name=sent.node.name,
        purpose=meta.get("purpose", ""),
        path=meta.get("path") or "",
        bytes=node_sends(sent.node, mesh),
        start=sent.start,
        end=sent.end,
        awaited=sent.awaited,
        exposed=sent.stall,
        overlaps=", ".join(name for name, _ in most),
    )


class _Scheduler:
    """List scheduling in the graph's order, except for nodes that fill waits and collectives for the idle link."""

    def __init__(self, module: fx.GraphModule, pieces: Pieces, costs: Costs, bound: int) -> None:
        self._nodes, self._output = pieces.nodes, module.graph.output_node()
        self._index = {n: i for i, n in enumerate(self._nodes)}
        self._streams, self._memory, self._bound = Streams(costs), Walk(pieces), bound
        # Closures are looked for at every step of the order, so what they ask of the graph is a table.
        self._inputs = [[self._index[p] for p in n.all_input_nodes] for n in self._nodes]
        self._missing = [len(inputs) for inputs in self._inputs]
        self._starts = [i for i, n in enumerate(self._nodes) if n.target in COLLECTIVES]
        self._apart = [n.target in COLLECTIVES or is_loop(n) for n in self._nodes]  # is in no closure
        self.was_refused = False
        """True if a larger bound of memory would have given another order."""
        self._ready: list[int] = []
        self._done = [False] * len(self._nodes)
        self._order: list[fx.Node] = []
        self._next = 0

    def run(self) -> list[fx.Node]:
        """The new order of all nodes, with the output last."""
        for i, count in enumerate(self._missing):
            if count == 0:
                heapq.heappush(self._ready, i)
        for i, node in enumerate(self._nodes):
            if node.op == "placeholder":  # their order is that of the arguments
                self._emit(i)
        while len(self._order) < len(self._nodes):
            chosen = self._nodes[self._choose()]
            # The link must not become idle while this node runs, because nothing can start before the node ends. A loop
            # waits for all messages under way.
            while not is_loop(chosen) and self._streams.sent <= self._streams.until(chosen) and self._start_one():
                pass
            self._emit(self._choose())
        return [*self._order, self._output]

    def _choose(self) -> int:
        """The first ready node. If it would wait: a later node that need not, else the wait that ends first."""
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
        """Start the first of the next collectives whose inputs exist or can be computed. False if there is none."""
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
        """True if these nodes may run now within the bound of memory.

        Their peak, workspaces included, must be within it. So must all that they allocate, without the memory that is
        freed meanwhile, because a message reads its input until it has been sent.
        """
        memory = self._memory
        allowed = max(memory.peak_of(*nodes), memory.live + memory.allocated_by(*nodes)) <= self._bound
        self.was_refused |= not allowed
        return allowed

    def _closure(self, i: int) -> list[int] | None:
        """The nodes that compute a collective's inputs, in order; None if they are too many, or one would wait."""
        needed: set[int] = set()
        stack, done = [*self._inputs[i]], self._done
        while stack:
            j = stack.pop()
            if done[j] or j in needed:
                continue
            if self._apart[j] or self._waits(j) or len(needed) >= _CLOSURE:
                return None
            node = self._nodes[j]
            if node.target is WAIT and not self._streams.was_sent(node.args[0]):  # type: ignore[arg-type]
                return None
            needed.add(j)
            stack += self._inputs[j]
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
