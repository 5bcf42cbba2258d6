"""Times by node."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftrain import tree
from ftrain.analysis.op_times import OpTimes, op_key
from ftrain.graph.text import op_name
from ftrain.plan.jit import jit
from ftrain.profile.nodes import profile_nodes
from ftrain.trace.accumulate import accumulate
from tests.helpers.momentum_steps import (
    assert_same_bits,
    momentum_state,
    momentum_step,
    stack_batch,
    stack_loss,
    stack_params,
)


def test_every_op_is_timed_and_nothing_changes():
    state, batch = momentum_state(stack_params()), stack_batch()
    before = tree.map(torch.clone, state)
    step = jit(momentum_step(stack_loss), donate="state")
    times = profile_nodes(step, state, batch, repeats=2)
    compiled = step.lower(state, batch)
    assert [t.name for t in times] == [n.name for n in compiled.executed.graph.nodes if n.op == "call_function"]
    assert all(t.microseconds > 0 for t in times)
    first = next(t for t in times if t.op == "mm")
    assert (first.path, first.phase) == ("state.params.layers.0.w", "forward")
    assert "momentum_steps.py:" in first.source
    assert_same_bits(state, before)


def test_nodes_of_loops_are_added_up():
    state, (x, y) = momentum_state(stack_params()), stack_batch()
    batch = (x.reshape(4, 2, 16), y.reshape(4, 2, 16))
    names = [
        t.name for t in profile_nodes(momentum_step(accumulate(stack_loss, 4, stacked=True)), state, batch, repeats=1)
    ]
    assert len(names) == len(set(names))
    assert sum(".mm" in name for name in names) == 3 + 5


def test_at_least_one_run():
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        profile_nodes(lambda x: x.sin(), torch.ones(3), repeats=0)


def test_steps_lowered_later_take_the_times_that_were_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRAIN_CACHE", str(tmp_path))
    state, batch = momentum_state(stack_params()), stack_batch()
    step = jit(momentum_step(stack_loss), donate="state")
    profile_nodes(step, state, batch)
    assert not list(tmp_path.iterdir())
    profile_nodes(step, state, batch, remember=True)
    nodes = [n for n in step.lower(state, batch).graph.graph.nodes if n.op == "call_function"]
    times = OpTimes.on(torch.device("cpu"))
    measured = [n for n in nodes if op_key(n) in times.measured]
    assert len(measured) == len(nodes)
    multiply = next(n for n in nodes if op_name(n) == "mm")
    assert times.microseconds(multiply) == times.measured[op_key(multiply)]


class Counting(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self):
        super().__init__()
        self.runs = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
def test_on_a_card_a_short_op_runs_several_times_and_one_that_writes_once():
    """To see a short op's time; of one that writes over its argument a second run would be of other numbers."""
    step = jit(lambda s, x: (s + x, x.sin()), donate="s")
    s, x = torch.ones(256, device="cuda"), torch.ones(256, device="cuda")
    step.lower(s, x)
    with Counting() as seen:
        profile_nodes(step, s, x, repeats=1)
    assert seen.runs["aten.sin.default"] == 2 * (1 + 10)  # a run that warms up, and one that counts
    assert sum(n for op, n in seen.runs.items() if op.startswith("aten.add")) == 2
