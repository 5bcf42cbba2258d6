"""New state goes over old: the same values, in the arguments' memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.passes.donate import donate, write_in_place
from ftrain.passes.early_updates import update_early
from tests.helpers.graphs import graph_of, inputs_of, ops_of


def run_donated(function, *inputs, donated):
    """The results of the donated graph: those that stay, and the arguments that were written."""
    module = graph_of(function, *inputs)
    names = inputs_of(module)
    by_name = {names[slot]: output for slot, output in donated.items()}
    update_early(module, by_name)
    donate(module, by_name)
    results = []
    for in_place in (False, True):
        if in_place:
            write_in_place(module)
        arguments = [x.clone() for x in inputs]
        results.append((module(*arguments), [arguments[slot] for slot in donated]))
    return module, results


def assert_donated(function, *inputs, donated):
    expected = function(*inputs)
    module, results = run_donated(function, *inputs, donated=donated)
    kept = [x for i, x in enumerate(expected) if i not in donated.values()]
    for outputs, written in results:
        for a, b in zip(outputs, kept, strict=True):
            assert torch.equal(a, b)
        for a, output in zip(written, donated.values(), strict=True):
            assert torch.equal(a, expected[output])
    return module


a, b = torch.randn(3, 3), torch.randn(3, 3)

CASES = {
    "update": lambda x, y: [x + y, (x * y).sum()],
    "unchanged": lambda x, y: [x, y + 1],
    "the other argument": lambda x, y: [y, x + y],
    "a view of itself": lambda x, y: [x.t(), x + y],
    "a view of the other": lambda x, y: [y.t(), y],
    "read after it was made": lambda x, y: [(new := x + y), new * x],
    "a result that views the old value": lambda x, y: [x + y, x[0]],
    "a result that is the old value": lambda x, y: [x + y, x],
    "a result that is the new value": lambda x, y: [(new := x + y), new],
    "a result that views the new value": lambda x, y: [(new := x + y), new[0]],
    "through itself transposed": lambda x, y: [x.t() + y, y],
    "a constant": lambda x, y: [torch.zeros_like(x), x + y],
    "a broadcast": lambda x, y: [y[:1].expand(3, 3), x],
}


@pytest.mark.parametrize("name", CASES)
def test_values_do_not_change(name):
    assert_donated(CASES[name], a, b, donated={0: 0})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [y, x],
        lambda x, y: [y.t(), x.t()],
        lambda x, y: [(new := x + y), new],
        lambda x, y: [x * y, x - y],
        lambda x, y: [x - y, x],
    ],
)
def test_two_donated_arguments(function):
    assert_donated(function, a, b, donated={0: 0, 1: 1})


UNARY = [torch.neg, torch.sqrt, torch.t, lambda x: x.reshape(9).reshape(3, 3), lambda x: x[:1].expand(3, 3), torch.sin]
BINARY = [torch.add, torch.mul, torch.maximum, lambda x, y: torch.lerp(x, y, 0.25)]


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    results=st.lists(st.integers(0, 9), min_size=3, max_size=5),
)
def test_values_of_random_programs_do_not_change(program, results):
    def function(x, y, z):
        values = [x, y, z]
        for op, i, j in program:
            left, right = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(UNARY[op](left) if op < len(UNARY) else BINARY[op - len(UNARY)](left, right))
        return [values[-1 - i % len(values)] for i in results]

    positive = [torch.rand(3, 3) + 1 for _ in range(3)]
    expected = [torch.nan_to_num(x) for x in function(*positive)]
    _, outcomes = run_donated(function, *positive, donated={0: 0, 1: 1, 2: 2})
    for kept, written in outcomes:
        for ours, theirs in zip([*written, *kept], expected, strict=True):
            assert torch.equal(torch.nan_to_num(ours), theirs)


def test_elementwise_updates_need_no_memory():
    module = assert_donated(lambda x, y: [x * 0.9 + y, y], a, b, donated={0: 0})
    assert ops_of(module) == ["mul", "add_out"]
    assert not any(n.target is torch.ops.aten.copy_.default for n in module.graph.nodes)


def test_writes_come_right_after_the_last_reader():
    def function(x, y):
        new = x + y
        return [new, x.sin(), (y * 2).cos()]

    module = graph_of(function, a, b)
    donate(module, {inputs_of(module)[0]: 0})
    order = ops_of(module)
    assert order.index("copy__default") == order.index("sin") + 1
