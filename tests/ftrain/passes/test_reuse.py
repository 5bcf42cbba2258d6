"""Elementwise ops write over temporaries that die in them: the same values, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.analysis.liveness import plan_memory
from ftrain.passes.clean import clean
from ftrain.passes.reuse import reuse_memory
from tests.helpers.graphs import graph_of, ops_of

a, b = torch.rand(3, 4) + 1, torch.rand(3, 4) + 1


def reused(function, *inputs):
    """The graph after the pass, once its values are known to be those of before and its inputs as they were."""
    module = graph_of(function, *inputs)
    clean(module)
    before = plan_memory(module).peak
    expected, copies = module(*inputs), [x.clone() for x in inputs]
    reuse_memory(module)
    for got, value in zip(module(*copies), expected, strict=True):
        assert torch.equal(got, value)
    for copy, given_ in zip(copies, inputs, strict=True):
        assert torch.equal(copy, given_)
    assert plan_memory(module).peak <= before
    return module


def test_a_chain_needs_one_temporary():
    module = reused(lambda x, y: [torch.sqrt(x @ y.t()) * 2 + 1], a, b)
    assert ops_of(module) == ["t", "mm", "sqrt_out", "mul_out", "add_out"]
    assert plan_memory(module).peak == 3 * 3 * 4


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("an argument", lambda x, y: [x * y, (x + y).sum()]),
        ("read again later", lambda x, y: [(t := x.sin()) * y, t.cos()]),
        ("a result itself", lambda x, y: [(t := x.sin()), t * y]),
        ("a result's view", lambda x, y: [(t := x.sin())[0], t * y]),
        ("read again through a view", lambda x, y: [(v := (t := x.sin())[0]).exp(), t * y, v.cos()]),
        ("a part of other memory", lambda x, y: [x.sin()[0] * y[0]]),
        ("another shape", lambda x, y: [x.sin()[:, :1].clone() * y]),
        ("another dtype", lambda x, y: [x.sin() * y.double()[0]]),
        ("another layout", lambda x, y: [x.sin().t() * y.t()]),
        ("read twice, once transposed", lambda x, y: [(s := (x @ y.t())) * s.t()]),
        ("viewed after", lambda x, y: [(x.sin() * y).t()]),
    ],
)
def test_memory_that_is_still_needed_is_left_alone(name, function):
    module = reused(function, a, b)
    assert not [op for op in ops_of(module) if op.startswith("mul_out")], name


def test_a_square_is_taken_in_place():
    assert ops_of(reused(lambda x: [(t := x.sin()) * t], a)) == ["sin", "mul_out"]


UNARY = [torch.neg, torch.sqrt, torch.t, lambda x: x.reshape(9).reshape(3, 3), lambda x: x[:1].expand(3, 3), torch.sin]
BINARY = [torch.add, torch.mul, torch.maximum, lambda x, y: torch.lerp(x, y, 0.25)]


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    results=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_values_of_random_programs_do_not_change(program, results):
    def function(x, y):
        values = [x, y]
        for op, i, j in program:
            left, right = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(UNARY[op](left) if op < len(UNARY) else BINARY[op - len(UNARY)](left, right))
        return [values[-1 - i % len(values)].nan_to_num() for i in results]

    reused(function, torch.rand(3, 3) + 1, torch.rand(3, 3) + 1)


def test_a_collective_reads_until_its_wait():
    def function(x, y):
        mine = x.sin()
        started = torch.ops._c10d_functional.all_reduce.default(mine, "sum", "a group")
        product = mine * y
        return [product, torch.ops._c10d_functional.wait_tensor.default(started)]

    module = graph_of(function, a, b)
    reuse_memory(module)
    assert ops_of(module) == ["sin", "all_reduce", "mul", "wait_tensor"]
