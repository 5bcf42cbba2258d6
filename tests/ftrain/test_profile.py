"""Times by node."""

import pytest
import torch
from momentum_steps import assert_same_bits, momentum_state, momentum_step, stack_batch, stack_loss, stack_params

from ftrain import tree
from ftrain.accumulate import accumulate
from ftrain.jit import jit
from ftrain.profile import profile_nodes


def test_every_op_is_timed_and_nothing_changes():
    state, batch = momentum_state(stack_params()), stack_batch()
    before = tree.map(torch.clone, state)
    compiled = jit(momentum_step(stack_loss), donate="state").lower(state, batch)
    times = profile_nodes(compiled, state, batch, repeats=2)
    assert [t.name for t in times] == [n.name for n in compiled.executed.graph.nodes if n.op == "call_function"]
    assert all(t.microseconds > 0 for t in times)
    first = next(t for t in times if t.op == "mm")
    assert (first.path, first.phase) == ("state.params.layers.0.w", "forward")
    assert "momentum_steps.py:" in first.site
    assert_same_bits(state, before)


def test_nodes_of_loops_are_added_up():
    state, (x, y) = momentum_state(stack_params()), stack_batch()
    batch = (x.reshape(4, 2, 16), y.reshape(4, 2, 16))
    compiled = jit(momentum_step(accumulate(stack_loss, 4))).lower(state, batch)
    names = [t.name for t in profile_nodes(compiled, state, batch, repeats=1)]
    assert len(names) == len(set(names))
    assert sum(".mm" in name for name in names) == 3 + 5


def test_at_least_one_run():
    compiled = jit(lambda x: x.sin()).lower(torch.ones(3))
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        profile_nodes(compiled, torch.ones(3), repeats=0)
