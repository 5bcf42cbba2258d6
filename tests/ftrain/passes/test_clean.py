"""Nodes that compute nothing are dropped."""

import pytest
import torch

import ftrain
from ftrain.passes.clean import clean
from tests.helpers.graphs import graph_of, ops_of


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: [x.detach().sin().detach()], ["sin"]),
        (lambda x: [x.view(2, 3).sin()], ["sin"]),
        (lambda x: [x.expand(2, 3).sin()], ["sin"]),
        (lambda x: [x.view(3, 2).sin()], ["view", "sin"]),
        (lambda x: [x.sin(), x.cos()][:1], ["sin"]),
        (lambda x: [x.t().contiguous().clone()], ["t", "clone", "clone_1"]),
        (lambda x: [x], []),
    ],
)
def test_what_is_left(function, left):
    x = torch.randn(2, 3)
    module = graph_of(function, x)
    clean(module)
    assert ops_of(module) == left
    assert torch.equal(module(x)[0], function(x)[0])


def test_checks_are_kept():
    def function(x):
        torch._assert_async((x > 0).all())
        return [x + 1]

    module = graph_of(function, torch.ones(2))
    clean(module)
    assert any("assert" in name for name in ops_of(module))


def test_sizes_that_depend_on_data_are_not_taken_for_others():
    step = ftrain.jit(lambda x, w: (x[x[:, 0, 0] > 0] @ w).sum())  # folds [n, 2, 3] to [2 n, 3]
    x, w = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4)
    torch.testing.assert_close(step(x, w), (x[x[:, 0, 0] > 0] @ w).sum())
