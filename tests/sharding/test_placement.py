"""Placements: the pieces of an array, and how a rank makes the whole of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement, Split, place, use
from tests.helpers.ranks import on_ranks

MESH = Mesh(2, 2, 2, 2, "virtual")


def placed(shape, axes=None, *, mesh=MESH, parameters=("shard", "sequence"), experts=True):
    return place(shape, axes or ["embed"] * len(shape), mesh=mesh, parameters=parameters, experts=experts)


def test_parameters_are_divided_on_the_first_dim_and_copied_along_replicate():
    assert placed((8, 6)) == Placement((8, 6), (Split(0, ("shard", "sequence"), 4),), ("replicate",))


def test_experts_are_divided_over_their_axis_and_the_rest_over_expert_shard():
    found = placed((4, 6, 8), ("expert", "embed", "mlp"))
    splits = (Split(0, ("expert",), 2, gathered=False), Split(1, ("expert_shard",), 2))
    assert found == Placement((4, 6, 8), splits, ("replicate",))
    assert found.local_shape == (2, 3, 8)
    assert found.used_shape == (2, 6, 8)


def test_without_division_there_is_a_copy_on_every_rank():
    assert placed((8, 6), parameters=()) == Placement((8, 6), (), ("replicate", "shard", "sequence"))


def test_an_even_dim_is_preferred_to_much_padding():
    assert placed((3, 64)).splits[0].dim == 1
    assert placed((1001, 64)).splits[0].dim == 0
    assert placed((3,)).local_shape == (1,)


def test_a_dim_that_no_plan_splits_is_left_whole():
    assert placed((64, 8), (None, "embed")).splits[0].dim == 1
    assert placed((12, 8), ("layers", None)) == Placement((12, 8), (), ("replicate", "shard", "sequence"))


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 experts cannot be divided over expert=2"):
        placed((3, 4, 4), ("expert", "embed", "mlp"))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    parameters=st.sampled_from([(), ("shard",), ("sequence",), ("shard", "sequence")]),
)
def test_joining_the_pieces_gives_the_array_back(shape, parameters):
    placement = placed(tuple(shape), parameters=parameters)
    whole = torch.randn(shape)
    pieces = [placement.shard(whole, MESH, rank) for rank in range(MESH.size)]
    assert {tuple(p.shape) for p in pieces} == {placement.local_shape}
    assert torch.equal(placement.join(pieces, MESH), whole)
    held = sum(p.double().sum() for p in pieces)  # padding is zero
    copies = MESH.size // max(1, placement.splits[0].size if placement.splits else 1)
    torch.testing.assert_close(held, whole.double().sum() * copies)


@pytest.mark.parametrize("shape", [(8, 3), (5, 3), (2,), (1, 7), (3, 12)])
@pytest.mark.parametrize("parameters", [(), ("shard",), ("shard", "sequence")])
def test_a_rank_uses_the_whole_and_its_gradient_is_the_sum_over_ranks(shape, parameters):
    placement = placed(shape, parameters=parameters)
    whole = torch.randn(shape, dtype=torch.float64)
    data = [torch.randn(shape, dtype=torch.float64) for _ in range(MESH.size)]
    pieces = [placement.shard(whole, MESH, rank) for rank in range(MESH.size)]

    def step(piece, x):
        leaf = piece.detach().requires_grad_()
        seen = use(leaf, placement, MESH)
        return [seen.detach(), torch.autograd.grad((seen * x).sum(), leaf)[0]]

    results = on_ranks(step, MESH, pieces, data)
    assert all(torch.equal(seen, whole) for seen, _ in results)
    torch.testing.assert_close(placement.join([g for _, g in results], MESH), sum(data), rtol=1e-12, atol=1e-12)
