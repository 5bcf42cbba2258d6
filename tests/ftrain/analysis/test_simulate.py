"""A program on paper, by hand: when messages start and end, and what compute waits for."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from ftrain.analysis.op_times import OpTimes, Speed, op_key
from ftrain.analysis.simulate import Costs, OneLink, simulate
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.loop import run_loop
from ftrain.passes.overlap import simulate_schedule
from ftrain.sharding import Mesh
from ftrain.sharding.link import Link

MESH = Mesh(1, 2, kind="fake")
LINK = Link(latency=4.0, bandwidth=1e9)  # 4 us a message and 1 us for each 1,000 bytes
GATHER = next(op for op, kind in COLLECTIVES.items() if kind == "all_gather")
SENT = 4000  # bytes of a message: 8 us


class Program:
    """Writes a graph of ops that take 10 us each and messages that take 8 us each."""

    def __init__(self):
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = torch.empty(SENT // 4, device="meta")
        self.times = OpTimes(Speed("test", {torch.float32: 1e12}, 1e12, 1e12, launch=1.0))

    def compute(self):
        node = self.graph.call_function(torch.ops.aten.sin.default, (self.x,))
        node.meta.update(val=self.x.meta["val"], path="layer")
        self.times.measured[op_key(node)] = 10.0
        return node

    def send(self):
        node = self.graph.call_function(GATHER, (self.x, MESH.shard, MESH.group("shard").name))
        node.meta["val"] = torch.empty(2 * SENT // 4, device="meta")
        return node

    def wait(self, message):
        self.graph.call_function(WAIT, (message,)).meta["val"] = message.meta["val"]

    def run(self, *, slowdown=1.0):
        self.graph.output([self.x])
        module = fx.GraphModule({}, self.graph)
        return simulate(module, Costs.of(module, self.times, replace(OneLink(MESH, LINK), slowdown=slowdown)))


def test_messages_share_a_link_and_hide_behind_compute():
    program = Program()
    first, second = program.send(), program.send()
    program.compute()
    program.wait(first)
    program.wait(second)
    tally, sent = program.run()
    assert [(m.start, m.end, m.awaited, m.stall) for m in sent] == [(0, 8, 10, 0), (8, 16, 10, 6)]
    assert (tally.step, tally.compute, tally.communication, tally.exposed) == (16, 10, 16, 6)
    assert tally.links == {"link": 16}


def test_a_message_starts_when_compute_reaches_it():
    program = Program()
    program.compute()
    message = program.send()
    program.compute()
    program.wait(message)
    program.compute()
    tally, (sent,) = program.run()
    assert (sent.start, sent.end, sent.awaited, sent.stall) == (10, 18, 20, 0)
    assert (tally.step, tally.exposed) == (30, 0)


def test_a_message_that_nobody_waits_for_ends_with_the_step():
    program = Program()
    program.send()
    tally, _ = program.run()
    assert (tally.step, tally.exposed) == (8, 8)


def test_messages_slow_compute_down_while_they_are_under_way():
    program = Program()
    message = program.send()
    program.compute()
    program.wait(message)
    tally, _ = program.run(slowdown=2.0)
    assert (tally.step, tally.compute) == (10 + 4, 10), "4 of the 10 us are done in the 8 us of the message"


def test_a_schedule_tells_what_a_message_overlaps():
    program = Program()
    program.compute()
    message = program.send()
    program.compute()
    program.compute()
    program.wait(message)
    program.graph.output([program.x])
    module = fx.GraphModule({}, program.graph)
    (message,) = simulate_schedule(module, MESH, times=program.times, link=LINK).messages
    assert (message.bytes, message.overlaps, message.exposed) == (SENT, "layer", 0)


@pytest.mark.parametrize("hidden", [True, False])
def test_rounds_of_a_loop_run_one_after_the_other(hidden):
    """Of the messages of a loop the first round's are listed; a loop begins when all links are idle."""
    body = Program()
    message = body.send()
    if hidden:
        body.compute()
    body.wait(message)
    if not hidden:
        body.compute()
    body.graph.output([body.x])
    outer = Program()
    before = outer.send()
    graph = outer.graph
    held = graph.get_attr("body")
    loop = graph.call_function(run_loop, (held, 3, [outer.x], [], []))
    loop.meta["val"] = [outer.x.meta["val"]]
    outer.wait(before)
    graph.output([outer.x])
    module = fx.GraphModule({"body": fx.GraphModule({}, body.graph)}, graph)
    tally, sent = simulate(module, Costs.of(module, body.times, OneLink(MESH, LINK)))
    round_ = 10 if hidden else 18
    assert [(m.start, m.end) for m in sent] == [(0, 8), (8, 16)]
    assert (tally.step, tally.compute, tally.communication) == (8 + 3 * round_, 30, 8 + 24)
    assert tally.exposed == 8 + (0 if hidden else 24)
    assert tally.step == tally.compute + tally.exposed
