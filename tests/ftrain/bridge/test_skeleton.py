"""Modules without memory, and calls that leave them as they were."""

import torch
from torch import nn

from ftrain.bridge.skeleton import as_it_was


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
