"""Rows by their places in a pack."""

import pytest
import torch

from ftrain.kernels.pack import take_rows

X_TD = torch.arange(8.0).view(4, 2)


def test_the_place_behind_the_last_is_nowhere_and_gives_zeros():
    assert take_rows(X_TD, torch.tensor([3, 4, 0])).tolist() == [[6, 7], [0, 0], [0, 1]]


@pytest.mark.parametrize("place", [-1, 5, 2**62])
def test_a_place_outside_the_pack_is_no_row_of_it(place):
    with pytest.raises(IndexError):
        take_rows(X_TD, torch.tensor([place]))
