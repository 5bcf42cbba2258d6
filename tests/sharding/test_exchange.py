"""Rows between the ranks of a pack: merged, taken, followed and drawn as on one device."""

import pytest
import torch

from ftrain.kernels import random as numbers
from ftrain.kernels.embedding import merge_rows
from ftrain.kernels.pack import following, take_rows
from ftrain.sharding import exchange
from ftrain.sharding.batch import TokenOrder, Tokens, join_tokens, share
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.pack_heads import divide_heads_sharded, join_heads_sharded, own_heads_sharded
from tests.helpers.ranks import on_ranks

MESH = Mesh(1, 1, 4, kind="virtual")
ORDERS = [TokenOrder(4), TokenOrder(4, 4, True), TokenOrder(4, 2, True)]
P, N, D = 32, 5, 3
PLACES = {
    "spread": [[3, 30, 9, 32, 17], [0, 1, 2, 4, 5], [31, 29, 28, 32, 32], [10, 11, 12, 13, 14]],
    "all on one": [[0, 1, 2, 32, 32], [3, 4, 5, 32, 32], [6, 7, 32, 32, 32], [32, 32, 32, 32, 32]],
    "nowhere": [[32] * 5] * 4,
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(x, order):
    return [share(x, Tokens(), path="x", tokens=P, order=order, mesh=MESH, rank=r) for r in range(4)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_rows_of_any_rank_are_merged_into_the_tokens_of_all(order, places):
    x, rows, c = random(P, D), random(4 * N, D, seed=1), random(P, D, seed=2)
    index = [torch.tensor(p) for p in places]

    def step(x, rows, place, c):
        a, b = x.detach().requires_grad_(), rows.detach().requires_grad_()
        y = exchange.merge_rows_sharded(a, b, place, mesh=MESH, order=order)
        return [y.detach(), *torch.autograd.grad((y * c).sum(), (a, b))]

    got = on_ranks(step, MESH, shares(x, order), list(rows.chunk(4)), index, shares(c, order))
    a, b = x.detach().requires_grad_(), rows.detach().requires_grad_()
    y = merge_rows(a, b, torch.cat(index))
    dx, drows = torch.autograd.grad((y * c).sum(), (a, b))
    torch.testing.assert_close(join_tokens([g[0] for g in got], 0, order), y.detach(), rtol=0, atol=0)
    torch.testing.assert_close(join_tokens([g[1] for g in got], 0, order), dx, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([g[2] for g in got]), drows, rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("places", [*PLACES.values(), [[7, 7, 7, 7, 7]] * 4], ids=[*PLACES, "the same token"])
def test_rows_are_taken_from_the_tokens_of_all(order, places):
    x, c = random(P, D), random(4 * N, D, seed=2)
    index = [torch.tensor(p) for p in places]

    def step(x, place, c):
        a = x.detach().requires_grad_()
        y = exchange.take_rows_sharded(a, place, mesh=MESH, order=order)
        return [y.detach(), *torch.autograd.grad((y * c).sum(), a)]

    got = on_ranks(step, MESH, shares(x, order), index, list(c.chunk(4)))
    a = x.detach().requires_grad_()
    y = take_rows(a, torch.cat(index))
    (dx,) = torch.autograd.grad((y * c).sum(), a)
    torch.testing.assert_close(torch.cat([g[0] for g in got]), y.detach(), rtol=0, atol=0)
    torch.testing.assert_close(join_tokens([g[1] for g in got], 0, order), dx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_following_token_and_the_place_are_right_at_the_edges(order):
    x = torch.arange(P) * 10

    def step(x):
        index = exchange.pack_index_sharded(x.shape[0], x.device, mesh=MESH, order=order)
        return [exchange.following_sharded(x, mesh=MESH, order=order), index]

    got = on_ranks(step, MESH, shares(x, order))
    assert torch.equal(join_tokens([g[0] for g in got], 0, order), following(x))
    assert torch.equal(join_tokens([g[1] for g in got], 0, order), torch.arange(P))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_random_numbers_are_those_of_one_device(order):
    key = numbers.key(3)

    def step(key):
        return exchange.draw_over_batch_sharded(numbers.normal, key, (P // 4, D), mesh=MESH, order=order)

    got = on_ranks(step, MESH, [key] * 4)
    assert torch.equal(join_tokens([g[0] for g in got], 0, order), numbers.normal(key, (P, D)))


def test_only_rows_that_have_a_place_elsewhere_are_sent():
    """Rows for nowhere, and for the rank's own tokens, stay at home."""
    index = [torch.tensor([8 * rank, 8 * rank + 1, 32, 32, 32]) for rank in range(4)]

    def step(place):
        way = exchange.route(place, P // 4, mesh=MESH, order=ORDERS[0])
        return [way.send_n]

    for rank, (send_n,) in enumerate(on_ranks(step, MESH, index)):
        assert send_n.tolist() == [N if r == rank else 0 for r in range(4)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_heads_of_all_tokens_are_divided_and_come_back(order):
    """A product with what is behind a token, head by head: value, gradients, and of the heads' own weights."""
    x, w, c = random(P, 8, D), random(8, seed=1), random(P, 8, D, seed=2)

    def before(x, w):
        return x.cumsum(0) * w[:, None]

    def step(x, w, c):
        a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
        own = own_heads_sharded(b, mesh=MESH)
        y = join_heads_sharded(before(divide_heads_sharded(a, mesh=MESH, order=order), own), mesh=MESH, order=order)
        return [y.detach(), *torch.autograd.grad((y * c).sum(), (a, b))]

    got = on_ranks(step, MESH, shares(x, order), [w] * 4, shares(c, order))
    a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = before(a, b)
    dx, dw = torch.autograd.grad((y * c).sum(), (a, b))
    torch.testing.assert_close(join_tokens([g[0] for g in got], 0, order), y.detach(), rtol=0, atol=0)
    torch.testing.assert_close(join_tokens([g[1] for g in got], 0, order), dx, rtol=0, atol=0)
    torch.testing.assert_close(sum(g[2] for g in got), dw, rtol=1e-12, atol=1e-12)


def test_heads_that_ranks_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 heads do not divide over a sequence axis of 4"):
        own_heads_sharded(random(6), mesh=MESH)
