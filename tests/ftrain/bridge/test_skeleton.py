"""Modules without memory, and calls that leave them as they were."""

import torch
from torch import nn

import ftrain
from ftrain.bridge.skeleton import as_it_was, call


class Keeps(nn.Module):
    """Writes what it has seen, and a table that it makes once."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x):
        self.seen = x if self.seen is None else self.seen + x
        self.table = x
        return self.seen


def test_what_a_forward_keeps_is_gone():
    module = nn.Sequential(Keeps())
    with as_it_was(module):
        module(torch.ones(2))
    assert module[0].seen is None
    assert not hasattr(module[0], "table")


def test_a_parameter_that_its_module_does_not_train_gets_no_gradient():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    grads = ftrain.grad(lambda params: call(module, params, (torch.ones(3),), {}).sum())(params)
    assert torch.equal(grads["weight"], torch.ones(2, 3))
    assert torch.equal(grads["bias"], torch.zeros(2))
