"""The guard lets pass what is like its examples, and nothing else."""

import gc
import weakref

import pytest
import torch

from ftrain.step.leaf_guard import guard_like


def leaves():
    return [torch.zeros(4, 3), torch.zeros((), dtype=torch.int64), torch.zeros(0, 2), torch.nn.Parameter(torch.ones(2))]


class Subclass(torch.Tensor):
    pass


def test_equal_leaves_pass():
    guard = guard_like(leaves())
    assert guard(*leaves())
    with torch.no_grad():
        assert guard(*leaves())


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 4),
        torch.zeros(4, 3, 1),
        torch.zeros(12),
        torch.zeros(4, 3, dtype=torch.float64),
        torch.zeros(4, 3, device="meta"),
        torch.zeros(3, 4).t(),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(4, 3, requires_grad=True),
        torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False),
        torch.zeros(4, 3).as_subclass(Subclass),
        torch.zeros(4, 3).to_sparse(),
        3,
        None,
    ],
)
def test_another_leaf_does_not_pass(other):
    guard = guard_like(leaves())
    assert not guard(other, *leaves()[1:])


def test_another_number_of_leaves_is_an_error():
    with pytest.raises(TypeError, match="wrong length"):
        guard_like(leaves())(*leaves()[:-1])


def test_the_examples_are_not_kept_alive():
    examples = leaves()
    guard, alive = guard_like(examples), weakref.ref(examples[0])
    del examples
    gc.collect()
    assert alive() is None
    assert guard(*leaves())
