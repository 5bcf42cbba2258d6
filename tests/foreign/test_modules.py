"""Modules that a user brings, unchanged by `functional_call`: three steps equal eager ones in float64, or a sentence.

Plain, donated, and with everything recomputed; random ops from the same seed.
"""

import pytest
import torch
from torch import nn

import ftrain
from tests.helpers.foreign_modules import MODULES, D, rows
from tests.helpers.foreign_steps import assert_equal, eager_steps, three_steps


class ByExpert(nn.Module):
    """Routes with boolean indexing: sizes that depend on data."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(D, 2), nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(x[chosen == i])
        return out


OPTIONS = [{}, {"donate": "params", "remat": "all"}]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_trains_as_in_eager_code(name):
    module, make = MODULES[name]
    module.double()
    torch.manual_seed(1)
    batch = make()
    batch = batch.double() if batch.is_floating_point() else batch
    expected = eager_steps(module, batch)
    for options in OPTIONS:
        assert_equal(three_steps(module, batch, lambda step, o=options: ftrain.jit(step, **o)), expected, f"{options}")


def test_a_batch_norm_that_tracks_is_refused_by_the_name_of_its_buffer():
    module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).double()
    with pytest.raises(ValueError, match=r"writes into 'module.1.num_batches_tracked'.*keep it in the state"):
        three_steps(module, rows().double(), lambda step: ftrain.jit(step))


def test_experts_by_boolean_index():
    module, batch = ByExpert().double(), rows().double()
    expected = eager_steps(module, batch)
    assert_equal(three_steps(module, batch, lambda step: ftrain.jit(step)), expected, "")


def test_spectral_norm_writes_its_vectors():
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(D, 3)).double()
    with pytest.raises(ValueError, match=r"writes into 'module.*_u'|writes into 'module.*_v'"):
        three_steps(module, rows().double(), lambda step: ftrain.jit(step))
