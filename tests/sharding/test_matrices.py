"""Whole matrices, each made on one of the ranks that hold pieces of it."""

import pytest
import torch

from ftrain.sharding.matrices import each_matrix
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import place
from tests.helpers.ranks import on_ranks

SMALL = Mesh(2, 2, 2, 2, "virtual")
ODD = Mesh(1, 3, kind="virtual")
ROWS, EXPERTS = ("embed", "mlp"), ("expert", "embed", "mlp")
CASES = {
    "rows": (SMALL, [((8, 6), ROWS)] * 13),
    "padded rows": (ODD, [((7, 4), ROWS), ((4, 7), ROWS), ((7, 4), ROWS)]),
    "columns": (ODD, [((5, 6), (None, "mlp"))] * 4),
    "experts and their pieces": (SMALL, [((4, 6, 5), EXPERTS), ((8, 6), ROWS), ((4, 6, 5), EXPERTS)]),
    "experts of no axis, padded": (ODD, [((7, 4, 5), EXPERTS)]),
    "copies alone": (Mesh(3, kind="virtual"), [((4, 5), ROWS)] * 4),
}


def cubes(xs):
    """Something that only the whole matrix knows; zeros stay zeros."""
    return [x.double() @ x.double().mT @ x.double() for x in xs]


def placed(mesh, shape, axes):
    return place(shape, axes, mesh=mesh, parameters=("shard", "sequence"), experts=True)


def pieces_of_all_ranks(mesh, leaves, work=cubes, dtype=torch.float64, together=1):
    """What each rank finds, and should find."""
    placements = [placed(mesh, *leaf) for leaf in leaves]
    arrays = [torch.randn(p.shape, dtype=torch.float64) for p in placements]
    pieces = [[p.shard(x, mesh, rank) for rank in range(mesh.size)] for x, p in zip(arrays, placements, strict=True)]

    def step(*mine):
        return each_matrix(work, mine, placements, mesh, dtype=dtype, together=together)

    expected = [
        [p.shard(x, mesh, rank) for x, p in zip(cubes(arrays), placements, strict=True)] for rank in range(mesh.size)
    ]
    return on_ranks(step, mesh, *pieces), expected


@pytest.mark.parametrize("together", [1, 100])
@pytest.mark.parametrize("case", CASES)
def test_each_rank_gets_its_pieces_of_what_whole_matrices_give(case, together):
    """One matrix at a time, and two."""
    found, expected = pieces_of_all_ranks(*CASES[case], together=together)
    for mine, right in zip(found, expected, strict=True):
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["rows", "experts and their pieces", "copies alone"])
def test_holders_of_copies_get_the_same_bits(case):
    mesh, leaves = CASES[case]
    found, _ = pieces_of_all_ranks(mesh, leaves)
    for at, leaf in enumerate(leaves):
        seen = {}
        for rank in range(mesh.size):
            first = seen.setdefault(placed(mesh, *leaf).windows(mesh, rank), found[rank][at])
            assert torch.equal(found[rank][at], first)


@pytest.mark.parametrize(("mesh", "leaf", "number", "most"), [
    (Mesh(1, 4, kind="virtual"), ((8, 6), ROWS), 8, 2),
    (Mesh(1, 4, kind="virtual"), ((8, 6), ROWS), 6, 2),
    (Mesh(2, 2, kind="virtual"), ((8, 6), ROWS), 8, 2),
    (Mesh(4, kind="virtual"), ((8, 6), ROWS), 8, 2),
    (Mesh(1, 4, kind="virtual"), ((8, 6, 5), EXPERTS), 1, 2),
    (Mesh(1, 4, 1, 2, kind="virtual"), ((8, 6, 5), EXPERTS), 1, 2),
], ids=str)  # fmt: skip
def test_ranks_divide_the_matrices_among_them(mesh, leaf, number, most):
    """`most` of all matrices are one rank's work."""
    worked = []

    def work(xs):
        worked.extend(x.shape[:-2].numel() for x in xs)
        return cubes(xs)

    pieces_of_all_ranks(mesh, [leaf] * number, work)
    assert sum(worked) == most


def test_what_is_sent_is_as_narrow_as_the_work():
    wide, _ = pieces_of_all_ranks(ODD, CASES["padded rows"][1])
    narrow, _ = pieces_of_all_ranks(ODD, CASES["padded rows"][1], dtype=torch.bfloat16)
    assert {x.dtype for x in wide[0]} == {torch.float64}
    assert {x.dtype for x in narrow[0]} == {torch.bfloat16}
