"""The shares of a batch: tokens in both orders, rows, places."""

import pytest
import torch

from ftrain.kernels.documents import Documents
from ftrain.sharding.batch import BatchRows, Offsets, Replicated, TokenIndices, TokenOrder, Tokens, join_tokens, share
from ftrain.sharding.mesh import Mesh

MESH = Mesh(1, 2, 2, kind="virtual")
ORDERS = [TokenOrder(2), TokenOrder(2, 2, True), TokenOrder(2, 1, True)]


def shares(leaf, rule, order, *, tokens=16, mesh=MESH):
    return [share(leaf, rule, path="x", tokens=tokens, order=order, mesh=mesh, rank=rank) for rank in range(mesh.size)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_tokens_are_divided_and_joined(order, dim):
    leaf = torch.arange(16)[None].expand(3, 16).contiguous() if dim else torch.arange(16)
    assert torch.equal(join_tokens(shares(leaf, Tokens(dim), order), dim, order), leaf)


def test_zigzag_pairs_an_early_chunk_with_a_late_one():
    found = shares(torch.arange(16), Tokens(), TokenOrder(2, 2, True))
    assert [s.tolist() for s in found] == [[0, 1, 6, 7], [2, 3, 4, 5], [8, 9, 14, 15], [10, 11, 12, 13]]


@pytest.mark.parametrize("order", [*ORDERS, TokenOrder(4, 2, True), TokenOrder(4, 4, True)])
def test_the_owner_of_a_place_holds_that_token(order):
    tokens = 16
    held = order.order(tokens).view(order.ranks, -1)
    rank_N, at_N = order.owner(torch.arange(tokens), tokens)
    assert torch.equal(held[rank_N, at_N], torch.arange(tokens))


def test_rows_go_in_turn_and_places_become_relative_to_the_pack():
    order = TokenOrder(2)
    assert [s.tolist() for s in shares(torch.arange(8), BatchRows(), order)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    places = torch.tensor([0, 7, 3, 16, 8, 15, 16, 9])
    assert [s.tolist() for s in shares(places, TokenIndices(), order)] == [[0, 7], [3, 8], [0, 7], [8, 1]]
    assert shares(torch.tensor(1.0), Replicated(), order)[3] == 1.0


def test_a_place_in_another_pack_is_refused():
    with pytest.raises(ValueError, match="'x': a row of data rank 0 stands at a token of another rank's pack"):
        shares(torch.tensor([9, 0, 0, 0]), TokenIndices(), TokenOrder(2))


def test_what_does_not_divide_is_named_with_the_multiple():
    with pytest.raises(ValueError, match=r"'x' of shape \[10\].*multiple of 2 packs x 4 chunks = 8"):
        shares(torch.arange(10), Tokens(), TokenOrder(2, 2, True))
    with pytest.raises(ValueError, match=r"'x': 6 rows .* do not divide over 4 ranks; pad to 8"):
        shares(torch.arange(6), BatchRows(), TokenOrder(2))


def test_the_offsets_of_a_pack_count_from_its_start():
    told = Documents.of(torch.tensor([0] * 5 + [1] * 3 + [2] * 8), packs=2, max_documents=3)
    assert told.offsets_N.tolist() == [0, 5, 8, 8, 16, 16, 16]
    of_packs = shares(told.offsets_N, Offsets(), TokenOrder(2))
    assert [s.tolist() for s in of_packs] == [[0, 5, 8, 8]] * 2 + [[0, 8, 8, 8]] * 2
    of_rows = Documents.of(torch.tensor([0, 0, 1, 1, 2, 3, 4, 4]), packs=4, max_documents=2).offsets_N
    assert [s.tolist() for s in shares(of_rows, Offsets(of="rows"), TokenOrder(2))] == [[0, 2, 2]] * 2 + [
        [0, 1, 2],
        [0, 2, 2],
    ]


def test_documents_of_one_pack_are_not_those_of_two():
    crossing = Documents.of(torch.tensor([0] * 6 + [1] * 10), max_documents=2).offsets_N
    with pytest.raises(ValueError, match=r"'x': the documents in the places of pack 0 are not those of its tokens"):
        shares(crossing, Offsets(), TokenOrder(2))
    with pytest.raises(ValueError, match=r"'x': places for 3 documents do not divide over 2 packs; .*packs=2"):
        shares(Documents.of(torch.tensor([0] * 8 + [1] * 8), max_documents=3).offsets_N, Offsets(), TokenOrder(2))
