"""A simulator of the time of one rank's program: a compute stream, and a stream of messages on each link.

The compute stream runs one node after the other in the order of the graph. A collective starts when compute has reached
it and its link has finished all earlier messages. Compute then continues, and stalls at the wait until the message has
arrived. A loop starts when all links are idle and runs its iterations one after the other. The links, the time of each
message and the slowdown of compute by messages are an argument (`Links`).
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
    """The links of a rank, as the simulator reads them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the links."""
        ...

    @property
    def slowdown(self) -> float:
        """The factor by which compute is slower while a message is under way; 1 for none."""
        ...

    def message(self, node: fx.Node) -> tuple[str, float]:
        """The name of the link that the collective of a node uses, and the microseconds that it takes there."""
        ...


@dataclass(frozen=True)
class OneLink:
    """One link for all messages of a `mesh`. Messages include padding and do not slow compute down."""

    mesh: Mesh
    link: Link
    names: tuple[str, ...] = ("link",)
    slowdown: float = 1.0

    def message(self, node: fx.Node) -> tuple[str, float]:
        """The link, and the microseconds of the bytes that a rank sends in the collective of a node."""
        return self.names[0], self.link.microseconds(node_sends(node, self.mesh))


@dataclass(frozen=True)
class Tally:
    """The time of a step, in microseconds.

    - `step`: from the start of the first op to the end of the last.
    - `compute`, `communication`: sums over ops and over messages.
    - `exposed`: the part of communication during which compute stalls.
    - `links`: communication by the name of the link.
    """

    step: float
    compute: float
    communication: float
    exposed: float
    links: Mapping[str, float] = field(default_factory=dict)


class Sent(NamedTuple):
    """One simulated collective; times are microseconds from the start of the step.

    - `start`, `end`: when the message starts and ends on its link. `awaited`: when compute reaches its wait.
    - `stall`: microseconds that compute then stalls.
    - `ran`: all compute nodes in order, with their microseconds. `beside`: the slice of `ran` between start and wait.
    """

    node: fx.Node
    start: float
    end: float
    awaited: float
    stall: float
    ran: Sequence[tuple[fx.Node, float]]
    beside: slice


class Run(NamedTuple):
    """The result of a simulation: the times, and the collectives in order of their start.

    `sent` holds the collectives of one iteration of a loop.
    """

    tally: Tally
    sent: tuple[Sent, ...]


@dataclass(frozen=True)
class Costs:
    """The costs of a graph's nodes, which do not depend on their order.

    - `compute`: microseconds of each compute node; of a loop, all its iterations.
    - `messages`: link and microseconds of each collective.
    - `rounds`: the simulation of one iteration of each loop.
    - `links`: the links of the rank.
    """

    compute: Mapping[fx.Node, float]
    messages: Mapping[fx.Node, tuple[str, float]]
    rounds: Mapping[fx.Node, Run]
    links: Links

    @classmethod
    def of(cls, module: fx.GraphModule, times: OpTimes, links: Links) -> Self:
        """The costs of a graph's nodes by `times` and `links`; bodies of loops are simulated in their current order."""
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
    """The state of a simulation: the clock of compute and the messages of each link, after some nodes have run."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self._slower = costs, costs.links.slowdown
        self.clock = 0.0
        """The time, in microseconds, at which compute can run the next node."""
        self._free = dict.fromkeys(costs.links.names, 0.0)
        self._ends: dict[fx.Node, float] = {}

    @property
    def sent(self) -> float:
        """The time, in microseconds, from which all links are idle."""
        return max(self._free.values())

    def was_sent(self, collective: fx.Node) -> bool:
        """True if the message of a collective has been started."""
        return collective in self._ends

    def until(self, node: fx.Node) -> float:
        """The time, in microseconds, at which compute is free again if a node runs next.

        A wait ends when its message has arrived.
        """
        costs = self._costs
        if node.target is WAIT:
            return max(self.clock, self._ends.get(node.args[0], 0.0))  # type: ignore[arg-type]
        if node in costs.rounds:
            return max(self.clock, self.sent) + _count(node) * costs.rounds[node].tally.step
        took = costs.compute.get(node, 0.0)
        slowed = min(took, max(0.0, self.sent - self.clock) / self._slower)
        return self.clock + (took + slowed * (self._slower - 1))

    def run(self, node: fx.Node) -> tuple[float, float]:
        """Run a node next. Return when it starts and ends: a collective on its link, any other node on compute."""
        if node in self._costs.messages:
            link, took = self._costs.messages[node]
            start = max(self.clock, self._free[link])
            self._free[link] = self._ends[node] = start + took
            return start, start + took
        start, self.clock = self.clock, self.until(node)
        return start, self.clock


def simulate(module: fx.GraphModule, costs: Costs) -> Run:
    """Simulate a graph in its current order. `costs`: those of its nodes, by `Costs.of`."""
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
