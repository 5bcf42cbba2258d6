"""A loop is one node, and gives what running it in Python gives."""

import pytest
import torch

from ftrain.analysis.meter import measure_peak
from ftrain.graph.loop import is_loop, loop
from ftrain.plan.jit import jit
from tests.helpers.momentum_steps import assert_same_bits

either_way = pytest.mark.parametrize("run", [lambda f: f, jit], ids=["eager", "jit"])


@either_way
def test_carry_items_and_constants(run):
    def step(a, b, xs, c):
        return loop(lambda a, b, x, c: [b, a + b * x + c], 5, carry=[a, b], xs=[xs], consts=[c])

    a, b, xs, c = torch.ones(3), torch.full((3,), 2.0), torch.randn(5, 3), torch.randn(3)
    expected = [a, b]
    for x in xs:
        expected = [expected[1], expected[0] + expected[1] * x + c]
    assert_same_bits(run(step)(a.clone(), b.clone(), xs, c), expected)


@either_way
def test_the_first_carry_is_not_written(run):
    def step(x):
        start = x * 2
        (total,) = loop(lambda c: [c + 1], 3, carry=[start], xs=[], consts=[])
        return total, start, loop(lambda c: [c * 2], 2, carry=[x], xs=[], consts=[])[0]

    x = torch.zeros(2)
    assert_same_bits(run(step)(x), (torch.full((2,), 3.0), torch.zeros(2), torch.zeros(2)))
    assert_same_bits(x, torch.zeros(2))


@either_way
def test_one_tensor_may_be_carried_twice(run):
    def step(x):
        zero = torch.zeros_like(x)
        return loop(lambda a, b: [a + 1, b + 2], 3, carry=[zero, zero], xs=[], consts=[])

    assert_same_bits(run(step)(torch.ones(2)), [torch.full((2,), 3.0), torch.full((2,), 6.0)])


@either_way
def test_bodies_close_over_tensors_of_the_step(run):
    def step(x, y):
        z = y * 2
        return loop(lambda c: [c * z + z + x], 3, carry=[x], xs=[], consts=[])

    x, y = torch.randn(2), torch.randn(2)
    expected = x
    for _ in range(3):
        expected = expected * (y * 2) + y * 2 + x
    assert_same_bits(run(step)(x, y), [expected])


@either_way
def test_loops_within_loops(run):
    def inner(c, x):
        return loop(lambda d: [d + x], 2, carry=[c], xs=[], consts=[])

    step = lambda x: loop(inner, 3, carry=[torch.zeros(2)], xs=[x], consts=[])[0]  # noqa: E731
    assert run(step)(torch.arange(6.0).reshape(3, 2)).tolist() == [12, 18]


def test_a_loop_is_one_node_and_writes_in_place():
    def step(x):
        return loop(lambda c, x: [c + x], 64, carry=[torch.zeros(1000)], xs=[x], consts=[])

    step = jit(step)
    x = torch.randn(64, 1000)
    compiled = step.lower(x)
    assert sum(is_loop(n) for n in compiled.graph.graph.nodes) == 1
    step(x)
    assert measure_peak(lambda: step(x)).peak == compiled.memory().peak == 4000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda c: [c.double()], r"leaf 0 goes in as \(2,\) torch.float32 and comes out as \(2,\) torch.float64"),
        (lambda c: [c[:1]], r"leaf 0 goes in as \(2,\) torch.float32 and comes out as \(1,\)"),
    ],
)
def test_a_carry_that_changes_is_refused(body, words):
    with pytest.raises(ValueError, match=words):
        jit(lambda x: loop(body, 3, carry=[x], xs=[], consts=[]))(torch.ones(2))
