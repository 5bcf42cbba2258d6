"""Nodes that compute nothing are dropped."""

import pytest
import torch

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
