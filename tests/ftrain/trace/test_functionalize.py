"""Writes into temporaries become values."""

import pytest
import torch

from ftrain.trace.functionalize import functionalize, mutating_nodes
from tests.helpers.graphs import graph_of, ops_of


def through_a_view(x):
    y = x * 2
    y[1:] += 1
    y[:, 0].zero_()
    return [y, y.sum()]


def after_a_view_was_read(x):
    y = x.clone()
    row = y[0]
    y.mul_(3)
    return [row + 0, y]


def scattered(x):
    y = torch.zeros_like(x)
    y.index_add_(0, torch.tensor([2, 0, 2]), x)
    return [y.scatter_(1, torch.zeros(3, 1, dtype=torch.int64), 7.0)]


@pytest.mark.parametrize("function", [through_a_view, after_a_view_was_read, scattered])
def test_results_are_the_same_without_writes(function):
    x = torch.randn(3, 3)
    module = graph_of(function, x)
    assert mutating_nodes(module)
    pure = functionalize(module, ["x"])
    assert not mutating_nodes(pure)
    for a, b in zip(pure(x), function(x), strict=True):
        assert torch.equal(a, b)


def test_a_graph_without_writes_is_returned_as_it_is():
    module = graph_of(lambda x: [x + 1], torch.ones(2))
    assert functionalize(module, ["x"]) is module


def test_nodes_keep_what_is_known_of_them():
    module = graph_of(lambda x: [(x * 2).add_(1)], torch.ones(2))
    for node in module.graph.nodes:
        node.meta.update(source=f"line of {node.name}", phase="forward", seq_nr=3)
    pure = functionalize(module, ["x"])
    assert ops_of(pure) == ["mul", "add"]
    meta = [n.meta for n in pure.graph.nodes if n.op == "call_function"]
    assert [m["source"] for m in meta] == ["line of mul", "line of add_"]
    assert all((m["phase"], m["seq_nr"]) == ("forward", 3) for m in meta)


@pytest.mark.parametrize("write", [lambda y: y.add_(1), lambda y: y[0].zero_(), lambda y: y.t().mul_(2)])
def test_a_write_that_reaches_an_input_names_it(write):
    module = graph_of(lambda x, y: [x + write(y).sum()], torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"writes into its input 'batch\.y'"):
        functionalize(module, ["state", "batch.y"])
