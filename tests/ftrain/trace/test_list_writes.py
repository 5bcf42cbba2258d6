"""Writes into lists of tensors that share memory give what eager code gives, which writes them one after the other."""

import pytest
import torch

import ftrain
from ftrain.trace.functionalize import functionalize
from tests.helpers.graphs import graph_of, ops_of

WRITES = {
    "lerp with the list reversed": lambda xs: torch._foreach_lerp_(xs, xs[::-1], 0.3),
    "copy from the list rotated": lambda xs: torch._foreach_copy_(xs, xs[1:] + xs[:1]),
    "copy onto itself": lambda xs: torch._foreach_copy_(xs, xs),
    "add with an option": lambda xs: torch._foreach_add_(xs, xs[::-1], alpha=2),
    "scalars in a list": lambda xs: torch._foreach_addcmul_(xs, xs[::-1], xs, [0.5, 2.0, 3.0]),
    "a tensor named twice": lambda xs: torch._foreach_mul_([xs[0], xs[0], xs[1]], 2.0),
    "views that meet": lambda xs: torch._foreach_neg_([xs[0][:2], xs[0][1:]]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_list_that_meets_itself_is_written_as_in_eager_code(write):
    def step(x_3N):
        rows = [row.clone() for row in x_3N]
        write(rows)
        return rows

    x_3N = torch.arange(9, dtype=torch.float64).view(3, 3) - 2
    for found, expected in zip(ftrain.jit(step)(x_3N), step(x_3N), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "parts", [lambda x: [x * 1, x * 2], lambda x: [*(x * 3).split(1)]], ids=["apart", "one buffer"]
)
def test_lists_that_lie_apart_stay_one_op(parts):
    def step(x):
        xs = parts(x)
        torch._foreach_mul_(xs, 2.0)
        return xs

    assert ops_of(functionalize(graph_of(step, torch.ones(2)), ["x"])).count("_foreach_mul") == 1
