"""Attention that modules of transformers ask for by its name: what it does not know is refused."""

import pytest
import torch
from torch import nn

from ftrain.bridge.attention import attend


def test_keys_that_a_model_has_chosen_are_refused():
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    chosen = torch.zeros(1, 5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="Module gives attention 'indices', which ours does not know"):
        attend(nn.Module(), q, k, v, None, indices=chosen)
    attend(nn.Module(), q, k, v, None, indices=None, position_ids=torch.arange(5), deterministic=True)
