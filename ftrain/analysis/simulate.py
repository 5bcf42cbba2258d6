"""A rank's program run on paper: a stream of compute, and one of messages on each link.

Compute runs one node after the other in the order of the graph. A collective starts when compute reaches it and its
link is done with what was sent before; compute goes on, and stands still at the wait if the message is not there. A
loop waits until all links are idle and runs its rounds one after the other. What links there are, which a collective
uses, how long it takes there, and how much messages slow compute down, are arguments (`Links`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

from torch import fx

from ftrain.analysis.communication import node_sends
from ftrain.analysis.op_times import OpTimes
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.loop import is_loop, loop_body
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh


class Links(Protocol):
    """The links of a rank: their `names`, and by how much compute is slower while a message is under way (1: not)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def slowdown(self) -> float: ...

    def message(self, node: fx.Node) -> tuple[str, float]:
        """The link that the collective of a node uses, and the microseconds that it takes there."""
        ...


@dataclass(frozen=True)
class OneLink:
    """One link for all messages, which are sent whole, padding included, and cost compute nothing."""

    mesh: Mesh
    link: Link
    names: tuple[str, ...] = ("link",)
    slowdown: float = 1.0

    def message(self, node: fx.Node) -> tuple[str, float]:
        """Microseconds by the bytes that a rank sends."""
        return self.names[0], self.link.microseconds(node_sends(node, self.mesh))


@dataclass(frozen=True)
class Tally:
    """Microseconds of a step: from first to last op, of compute, of communication, of the part of it during which
    compute stands still, and of communication by link: a step is as long as each of them is busy.
    """

    step: float
    compute: float
    communication: float
    exposed: float
    links: Mapping[str, float] = field(default_factory=dict)


class Sent(NamedTuple):
    """One collective: microseconds on the clock when it starts, ends and is waited for, and that compute then stands
    still; `ran`: all nodes that compute, with their microseconds, of which those in `beside` ran between its start and
    its wait.
    """

    node: fx.Node
    start: float
    end: float
    awaited: float
    stall: float
    ran: Sequence[tuple[fx.Node, float]]
    beside: slice


class Run(NamedTuple):
    """What a program comes to, and its collectives in the order in which they start; of a loop those of one round."""

    tally: Tally
    sent: tuple[Sent, ...]


@dataclass(frozen=True)
class Costs:
    """What each node of a graph costs, in whatever order they run: microseconds of its compute, the link and the
    microseconds of its message, and of a loop one round.
    """

    compute: Mapping[fx.Node, float]
    messages: Mapping[fx.Node, tuple[str, float]]
    rounds: Mapping[fx.Node, Run]
    links: Links

    @classmethod
    def of(cls, module: fx.GraphModule, times: OpTimes, links: Links) -> Self:
        """The costs of a graph's nodes; bodies of loops are run in the order that they have now."""
        nodes = module.graph.nodes
        messages = {n: links.message(n) for n in nodes if n.target in COLLECTIVES}
        rounds = {n: simulate(loop_body(n), cls.of(loop_body(n), times, links)) for n in nodes if is_loop(n)}
        compute = {n: _computes(n, times, rounds) for n in nodes if n.target is not WAIT and n not in messages}
        return cls(compute, messages, rounds, links)


def _computes(node: fx.Node, times: OpTimes, rounds: Mapping[fx.Node, Run]) -> float:
    return _count(node) * rounds[node].tally.compute if node in rounds else times.microseconds(node)


def _count(loop: fx.Node) -> int:
    return int(loop.args[1])  # type: ignore[arg-type]


class Streams:
    """The clock of compute, and what each link has sent, after some nodes of a graph have run."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self._slower = costs, costs.links.slowdown
        self.clock = 0.0
        """Microseconds when compute is free for the next node."""
        self._free = dict.fromkeys(costs.links.names, 0.0)
        self._ends: dict[fx.Node, float] = {}

    @property
    def sent(self) -> float:
        """Microseconds when all links are idle."""
        return max(self._free.values())

    def was_sent(self, collective: fx.Node) -> bool:
        """True if the message of a collective is there or under way."""
        return collective in self._ends

    def until(self, node: fx.Node) -> float:
        """When compute is free again if a node runs next; a wait lasts until its message is there."""
        costs = self._costs
        if node.target is WAIT:
            return max(self.clock, self._ends.get(node.args[0], 0.0))  # type: ignore[arg-type]
        if node in costs.rounds:
            return max(self.clock, self.sent) + _count(node) * costs.rounds[node].tally.step
        took = costs.compute.get(node, 0.0)
        slowed = min(took, max(0.0, self.sent - self.clock) / self._slower)
        return self.clock + (took + slowed * (self._slower - 1))

    def run(self, node: fx.Node) -> tuple[float, float]:
        """Run a node next; when it starts and ends, of a collective on its link, of all others on compute."""
        if node in self._costs.messages:
            link, took = self._costs.messages[node]
            start = max(self.clock, self._free[link])
            self._free[link] = self._ends[node] = start + took
            return start, start + took
        start, self.clock = self.clock, self.until(node)
        return start, self.clock


def simulate(module: fx.GraphModule, costs: Costs) -> Run:
    """Run a graph on paper in the order that it has now; `costs` are those of its nodes."""
    streams = Streams(costs)
    exposed = 0.0
    busy = dict.fromkeys(costs.links.names, 0.0)
    ran: list[tuple[fx.Node, float]] = []
    sent: dict[fx.Node, Sent] = {}
    inside: list[Sent] = []
    for node in module.graph.nodes:
        begin = max(streams.clock, streams.sent)
        start, end = streams.run(node)
        if node in costs.messages:
            link, took = costs.messages[node]
            busy[link] += took
            sent[node] = Sent(node, start, end, end, 0.0, ran, slice(len(ran), None))
        elif node.target is WAIT:
            exposed += end - start
            if node.args[0] in sent:
                message = sent[node.args[0]]
                beside = slice(message.beside.start, len(ran))
                sent[message.node] = message._replace(awaited=start, stall=end - start, beside=beside)
        elif node in costs.rounds:
            inner, rounds = costs.rounds[node], _count(node)
            exposed += begin - start + rounds * inner.tally.exposed
            for link, took in inner.tally.links.items():
                busy[link] += rounds * took
            inside += [_later(message, begin) for message in inner.sent]
            ran.append((node, costs.compute[node]))
        else:
            ran.append((node, costs.compute[node]))
    end = max(streams.clock, streams.sent)
    compute = sum(costs.compute.values())
    tally = Tally(end, compute, sum(busy.values()), exposed + end - streams.clock, busy)
    return Run(tally, tuple(sorted([*sent.values(), *inside], key=lambda message: message.start)))


def _later(message: Sent, by: float) -> Sent:
    return message._replace(start=by + message.start, end=by + message.end, awaited=by + message.awaited)
