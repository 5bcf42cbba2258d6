"""A canary for each private torch name about sizes that depend on data."""

import pytest
import torch

from ftrain.graph import torch_private as private
from ftrain.graph import torch_sizes


def test_sizes_that_depend_on_data_have_a_largest():
    with private.new_fake_mode():
        value = (
            private.trace_to_graph(lambda x: x.nonzero(), [torch.empty(3, 4)]).graph.output_node().args[0].meta["val"]
        )
    (symbol,) = torch_sizes.free_sizes(value)
    assert torch_sizes.largest_sizes(value, []) == {symbol: 12}
    assert torch_sizes.largest_sizes(value, [symbol]) == {}


def test_who_asks_for_a_number_that_only_data_have_is_told():
    frames = []
    with private.new_fake_mode(), torch_sizes.noting_numbers(frames.append):
        number = torch.ones(3).sum().item()
        with pytest.raises(private.DATA_DEPENDENT):
            bool(number > 0)
    assert [frame.f_code.co_filename for frame in frames] == [__file__]
