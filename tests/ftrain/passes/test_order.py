"""Updates run as soon as they can; values stay."""

import torch

from ftrain.passes.early_updates import update_early
from tests.helpers.graphs import graph_of, inputs_of, ops_of


def step(w0, w1, x):
    """Two layers with hand-written gradients; the optimizer is written tree by tree."""
    hidden = x.sin()
    out = hidden.cos()
    grad1 = out.tanh()
    grad0 = grad1.exp()
    moment0, moment1 = grad0 * 0.1, grad1 * 0.2
    return [w0 - moment0, w1 - moment1, out.sum()]


def traced():
    module = graph_of(step, *[torch.ones(2)] * 3)
    for node in module.graph.nodes:
        for phase, names in (("forward", ("sin", "cos")), ("backward", ("tanh", "exp"))):
            if node.name in names:
                node.meta["phase"] = phase
    return module


def test_each_chain_runs_when_its_gradient_is_there():
    module = traced()
    assert ops_of(module) == ["sin", "cos", "tanh", "exp", "mul", "mul_1", "sub", "sub_1", "sum_1"]
    names = inputs_of(module)
    update_early(module, {names[0]: 0, names[1]: 1})
    assert ops_of(module) == ["sin", "cos", "sum_1", "tanh", "mul_1", "sub_1", "exp", "mul", "sub"]
    inputs = [torch.randn(2) for _ in range(3)]
    for a, b in zip(module(*inputs), step(*inputs), strict=True):
        assert torch.equal(a, b)


def test_an_update_waits_for_the_last_reader_of_its_leaf():
    def late(w, x):
        return [w - x, (x.sin() * w).cos()]

    module = graph_of(late, torch.ones(2), torch.ones(2))
    for node in module.graph.nodes:
        if node.name in ("sin", "mul", "cos"):
            node.meta["phase"] = "backward"
    update_early(module, {inputs_of(module)[0]: 0})
    assert ops_of(module) == ["sin", "mul", "sub", "cos"]


def test_steps_that_the_backward_needs_come_before_it():
    def scaled(w, x):
        scale = w * 2
        return [w + 1, (x * scale).sin()]

    module = graph_of(scaled, torch.ones(2), torch.ones(2))
    for node in module.graph.nodes:
        if node.name in ("mul_1", "sin"):
            node.meta["phase"] = "forward"
    update_early(module, {})
    order = ops_of(module)
    assert order.index("mul") < order.index("mul_1") < order.index("sin")
