"""Sums, means and whole arrays of leaves that are pieces."""

import pytest
import torch

from ftrain.sharding import shards
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import place
from tests.helpers.ranks import on_ranks

MESH = Mesh(2, 2, 2, 2, "virtual")
SHAPES = [((8, 6), ("embed", "mlp")), ((5, 3), ("embed", "mlp")), ((4, 6, 5), ("expert", "embed", "mlp"))]


def placed(shape, axes, parameters=("shard", "sequence")):
    return place(shape, axes, mesh=MESH, parameters=parameters, experts=True)


def pieces_of(x, placement):
    return [placement.shard(x, MESH, rank) for rank in range(MESH.size)]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_whole_and_piece_are_inverse(shape, axes):
    placement, x = placed(shape, axes), torch.randn(shape, dtype=torch.float64)
    pieces = pieces_of(x, placement)

    def step(piece):
        whole = shards.whole_of(piece, placement, MESH)
        return [whole, shards.piece_of(whole, placement)]

    for rank, (whole, back) in enumerate(on_ranks(step, MESH, pieces)):
        assert torch.equal(back, pieces[rank])
        assert tuple(whole.shape) == placement.used_shape
        if whole.shape == x.shape:
            assert torch.equal(whole, x)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_means_do_not_count_padding(shape, axes, dims):
    placement, x = placed(shape, axes), torch.randn(shape, dtype=torch.float64)
    results = on_ranks(lambda p: shards.mean_over(p, dims, placement, MESH), MESH, pieces_of(x, placement))
    expected = x.mean(dims, keepdim=True)
    for rank, (found,) in enumerate(results):
        at = tuple(
            slice(0, 1) if d in dims else slice(start, start + length)
            for d, (start, length) in enumerate(placement.windows(MESH, rank))
        )
        mine = expected[at]
        torch.testing.assert_close(found[tuple(slice(0, n) for n in mine.shape)], mine, rtol=1e-12, atol=1e-12)


def test_sums_over_shards_count_copies_once():
    layouts = [placed(*SHAPES[0]), placed(*SHAPES[2]), placed(*SHAPES[0], parameters=()), placed(*SHAPES[1])]
    arrays = [torch.randn(p.shape, dtype=torch.float64) for p in layouts]

    def step(*pieces):
        values = torch.stack([(p * p).sum() for p in pieces])
        return shards.sum_over_shards(values, layouts, MESH)

    columns = [pieces_of(x, p) for x, p in zip(arrays, layouts, strict=True)]
    for (found,) in on_ranks(step, MESH, *columns):
        torch.testing.assert_close(found, torch.stack([(x * x).sum() for x in arrays]), rtol=1e-12, atol=1e-12)
