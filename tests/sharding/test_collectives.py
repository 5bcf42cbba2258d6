"""Each collective against its definition, and its backward against the transpose of that definition."""

import pytest
import torch

from ftrain.sharding import collectives
from ftrain.sharding.mesh import Mesh
from tests.helpers.ranks import on_ranks

MESH = Mesh(2, 2, kind="virtual")
WORLD, SHARD = MESH.group("replicate", "shard"), MESH.group("shard")


def values(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(MESH.size)]


def linear(name, x):
    """The collective under test, as a function of one tensor."""
    counts = torch.tensor([1, 1])
    return {
        "all_gather": lambda: collectives.all_gather(x, SHARD, purpose="test"),
        "all_gather_dim1": lambda: collectives.all_gather(x, SHARD, purpose="test", dim=1),
        "reduce_scatter": lambda: collectives.reduce_scatter(x, SHARD, purpose="test"),
        "reduce_scatter_dim1": lambda: collectives.reduce_scatter(x, SHARD, purpose="test", dim=1),
        "all_to_all": lambda: collectives.all_to_all(x, SHARD, purpose="test"),
        "permute": lambda: collectives.permute(x, WORLD, 1, purpose="test"),
        "all_to_all_rows": lambda: collectives.all_to_all_rows(x, counts, counts, 2, SHARD, purpose="test"),
    }[name]()


NAMES = ["all_gather", "all_gather_dim1", "reduce_scatter", "reduce_scatter_dim1", "all_to_all", "permute",
         "all_to_all_rows"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_is_the_transpose(name):
    """`sum_ranks <f(x), y> = sum_ranks <x, f^T(y)>` for all x and y is what makes gradients right."""
    x, y = values(2, 4), values(4, 8)

    def both(x_rank, y_rank):
        leaf = x_rank.detach().requires_grad_()
        out = linear(name, leaf)
        cotangent = y_rank[: out.shape[0], : out.shape[1]]
        (back,) = torch.autograd.grad(out, leaf, cotangent)
        return [(out * cotangent).sum().detach(), (leaf * back).sum().detach()]

    results = on_ranks(both, MESH, x, y)
    forward, backward = (sum(r[i] for r in results) for i in (0, 1))
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_transposes_of_torch_func_are_the_same(name):
    x, y = values(2, 4), values(4, 8)

    def by_func(x_rank, y_rank):
        out, pull = torch.func.vjp(lambda leaf: linear(name, leaf), x_rank)
        return pull(y_rank[: out.shape[0], : out.shape[1]].clone())[0]

    def by_autograd(x_rank, y_rank):
        leaf = x_rank.detach().requires_grad_()
        out = linear(name, leaf)
        return torch.autograd.grad(out, leaf, y_rank[: out.shape[0], : out.shape[1]])[0]

    for a, b in zip(on_ranks(by_func, MESH, x, y), on_ranks(by_autograd, MESH, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_second_derivative_passes_through():
    def cubed(x):
        def energy(leaf):
            return (collectives.all_gather(leaf, SHARD, purpose="test") ** 3).sum()

        return torch.func.grad(lambda leaf: (torch.func.grad(energy)(leaf) ** 2).sum())(x)

    x = values(2, 3)
    # both ranks of the group have every element: the gradient is 2 * 3x^2, that of its square 2 * (36x^4)' / 2 * 2
    for rank, (found,) in enumerate(on_ranks(cubed, MESH, x)):
        torch.testing.assert_close(found, 144 * x[rank] ** 3)


def test_all_gather_joins_in_the_order_of_the_group():
    x = values(2, 3)
    out = on_ranks(lambda t: collectives.all_gather(t, SHARD, purpose="test"), MESH, x)
    assert torch.equal(out[0][0], torch.cat(x[:2]))
    assert torch.equal(out[3][0], torch.cat(x[2:]))


def test_all_to_all_hands_piece_i_to_rank_i():
    x = values(2, 3)
    out = on_ranks(lambda t: collectives.all_to_all(t, SHARD, purpose="test"), MESH, x)
    assert torch.equal(out[1][0], torch.stack([x[0][1], x[1][1]]))


def test_rows_go_where_the_counts_say():
    x, send = values(3, 2), [torch.tensor(n) for n in ([1, 2], [3, 0], [0, 3], [2, 1])]
    receive = [torch.tensor(n) for n in ([1, 3], [2, 0], [0, 2], [3, 1])]

    def move(rows, send_n, receive_n):
        return collectives.all_to_all_rows(rows, send_n, receive_n, receive_n.sum().item(), SHARD, purpose="test")

    out = on_ranks(move, MESH, x, send, receive)
    assert torch.equal(out[0][0], torch.cat([x[0][:1], x[1]]))
    assert torch.equal(out[1][0], x[0][1:])
    assert torch.equal(out[2][0], x[3][:2])
    assert torch.equal(out[3][0], torch.cat([x[2], x[3][2:]]))


def test_a_sum_of_parts_and_a_copy_to_ranks_are_each_others_transpose():
    def both(x):
        leaf = x.detach().requires_grad_()
        total = collectives.sum_of_parts(leaf, WORLD, purpose="test")
        (part,) = torch.autograd.grad(total.sum(), leaf)
        copy = collectives.copy_to_ranks(leaf, WORLD, purpose="test")
        (summed,) = torch.autograd.grad((copy * x).sum(), leaf)
        return [total.detach(), part, summed]

    x = values(3)
    for total, part, summed in on_ranks(both, MESH, x):
        torch.testing.assert_close(total, sum(x))
        torch.testing.assert_close(part, torch.ones_like(part))
        torch.testing.assert_close(summed, sum(x))


def test_gradients_are_summed_in_the_dtype_that_was_asked():
    """bfloat16 on the wire, float32 in the sum: 256 + 1 is 256 in bfloat16."""
    mesh = Mesh(1, 4, kind="virtual")
    scale = [torch.tensor([256.0]), torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0])]

    def gradient(reduce):
        def of_rank(factor):
            leaf = torch.ones(1).requires_grad_()
            seen = collectives.all_gather(
                leaf, mesh.group("shard"), purpose="test", dtype=torch.bfloat16, reduce=reduce
            )
            return torch.autograd.grad((seen * factor.bfloat16()).sum(), leaf)[0]

        return on_ranks(of_rank, mesh, scale)[0][0]

    assert gradient(torch.float32).item() == 259.0
    assert gradient(torch.float32).dtype == torch.float32
    assert gradient(torch.bfloat16).item() != 259.0


def test_a_group_of_one_leaves_nothing():
    alone = Mesh(1, 1, 1).group("shard")
    x = torch.randn(2, 3)
    assert collectives.all_gather(x, alone, purpose="") is x
    assert collectives.permute(x, alone, 1, purpose="") is x
