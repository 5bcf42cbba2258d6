"""The hunt for NaNs and infinities."""

import pytest
import torch

from ftrain import tree
from ftrain.debug.finite import check_finite
from ftrain.kernels.mean import Mean
from ftrain.plan.jit import jit
from ftrain.trace.accumulate import accumulate
from tests.helpers.momentum_steps import assert_same_bits, momentum_state, momentum_step


def loss(params, x_TD):
    seen = torch.ones(len(x_TD), dtype=torch.bool)
    seen[0] = False
    scores = (x_TD @ params["w"]).masked_fill(~seen[:, None], float("-inf"))
    return Mean.of(scores.softmax(0) * params["scale"].log())


def make(scale=(1.0, 2.0, 3.0)):
    w = torch.arange(12.0).reshape(4, 3) / 10
    return momentum_state({"w": w, "scale": torch.tensor(scale)}), torch.ones(5, 4)


@pytest.fixture(params=[lambda f: f, lambda f: jit(f, donate="state"), lambda f: jit(f, remat="all")])
def step(request):
    return request.param(momentum_step(loss))


def test_infinities_of_masks_are_meant(step):
    assert check_finite(step, *make()) is None


@pytest.mark.parametrize(("value", "kind"), [(0.0, "infinity"), (-1.0, "NaN")])
def test_the_first_culprit_is_named(step, value, kind):
    found = check_finite(step, *make((1.0, value, 3.0)))
    assert (found.kind, found.op, found.phase, found.path) == (kind, "log", "forward", "state.params.scale")
    assert (found.count, found.size) == (1, 3)
    line = loss.__code__.co_firstlineno + 4
    assert found.source.endswith(f"test_debug.py:{line}")
    (given,) = found.inputs
    assert (given.finite, given.low, given.high) == (True, value, 3.0)
    for word in (kind, "log(", "state.params.scale", f"test_debug.py:{line}", f"[{value:.4g}, 3]"):
        assert word in str(found)


def test_a_culprit_in_the_backward_pass_is_led_to_its_forward_line():
    def root(params, x):
        return Mean.of((params["scale"] * x[0, 0]).sqrt())

    state, _ = make((0.0, 1.0, 2.0))
    found = check_finite(momentum_step(root), state, torch.ones(5, 4))
    assert (found.kind, found.phase) == ("infinity", "backward")
    assert found.source.endswith(f"test_debug.py:{root.__code__.co_firstlineno + 1}")


def test_nothing_of_the_arguments_changes():
    state, x = make((1.0, -1.0, 3.0))
    before = tree.map(torch.clone, state)
    step = jit(momentum_step(loss), donate="state")
    assert check_finite(step, state, x) is not None
    assert_same_bits(state, before)
    state, x = make()
    assert check_finite(step, state, x) is None
    step(state, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_arguments_that_are_not_finite_are_named(step, value):
    state, x = make((1.0, value, 3.0))
    found = check_finite(step, state, x)
    assert (found.op, found.path) == ("input", "state.params.scale")
    assert "argument leaf 'state.params.scale'" in str(found)


def test_the_round_of_a_loop_is_told():
    step = momentum_step(accumulate(lambda p, x: Mean.of((x @ p["w"]).log()), 3, stacked=True))
    state, _ = make()
    batch = torch.ones(3, 2, 4)
    batch[2, 1] = 0
    found = check_finite(step, state, batch)
    assert (found.kind, found.op, found.iterations[0].number) == ("infinity", "log", 2)
    assert "in iteration 2 of loop" in str(found)


def test_memory_that_was_never_written_is_no_finding():
    def step(x):
        return torch.empty_like(x).copy_(x) + x.new_empty(3, 4).zero_()

    assert check_finite(step, torch.ones(3, 4)) is None
