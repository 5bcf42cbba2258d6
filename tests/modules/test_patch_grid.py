"""Frames of any shape: every token in one window, windows together, places of patches, and the stretched table."""

import numpy as np
import pytest
import torch

from ftrain.modules.patch_grid import Grid, frame


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 5), (5, 3), (7, 7)])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_windows_tile_a_frame(rows, columns, side):
    found = frame(2 * rows, 2 * columns, Grid(merge=2, window=side))
    row_n, column_n = np.divmod(found.order_n, columns)
    window_n = found.window_N[::4]
    assert sorted(found.order_n) == list(range(rows * columns))
    assert (np.diff(window_n) >= 0).all()
    for i in range(rows * columns):
        same = window_n == window_n[i]
        near = (row_n // side == row_n[i] // side) & (column_n // side == column_n[i] // side)
        assert (same == near).all()


def test_patches_of_a_token_are_neighbours():
    found = frame(4, 6, Grid(merge=2, window=2))
    for n, token in enumerate(found.order_n):
        corner = np.array(divmod(int(token), 3)) * 2
        assert (found.places_N2[4 * n : 4 * n + 4] - corner).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (6, 4), (2, 10)])
def test_the_table_is_stretched_as_torch_stretches_pictures(rows, columns):
    table = torch.randn(5, 5, 3, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(
        table.permute(2, 0, 1)[None], size=(rows, columns), mode="bilinear", align_corners=True
    )[0].permute(1, 2, 0)
    found = frame(rows, columns, Grid(merge=2, side=5))
    taps, shares = torch.from_numpy(found.taps_N4), torch.from_numpy(found.shares_N4)
    stretched = (table.flatten(0, 1)[taps] * shares[..., None]).sum(1)
    torch.testing.assert_close(stretched, wanted[tuple(found.places_N2.T)], rtol=0, atol=1e-6)
