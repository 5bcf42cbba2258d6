"""A branch on a number that every call repeats is taken as eager code takes it; on any other number it is refused."""

import pytest
import torch

import ftrain

captured = torch.ones(3)


def mask_of_all(x):
    """As a model that makes a mask of its own where none is given, and looks whether anything is hidden."""
    mask = torch.ones(x.shape, dtype=torch.int64)
    hidden = (1 - mask) * -10 < 0
    return x * 100 if hidden.flatten().any().item() else x + 1


def lengths_of_all(x):
    lengths = torch.full((len(x),), 3)
    assert lengths.max().item() <= 3
    return x * lengths.sum().item()


def of_its_own_size(x):
    return x * (2 if torch.arange(len(x)).max() > 3 else 3)


def written_in_place(x):
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[1] = True
    return x if mask.any() else x * 2


def written_through_a_view(x):
    mask = torch.zeros(len(x))
    mask[1:].fill_(1)
    return x if mask.any() else x * 2


def written_as_out(x):
    mask = torch.zeros(len(x))
    torch.add(torch.ones(len(x)), 1, out=mask)
    return x if mask.any() else x * 2


def read_before_and_after_a_write(x):
    mask = torch.zeros(len(x), dtype=torch.int64)
    view, before = mask[1:], mask.max().item()
    mask[mask == 0] = 2
    return x * (1 + before) * view.max().item()


def made_of_python_numbers(x):
    lengths = torch.tensor([len(x), 2])
    return x * lengths.max().item()


FIXED = [
    made_of_python_numbers,
    mask_of_all,
    lengths_of_all,
    of_its_own_size,
    written_in_place,
    written_through_a_view,
    written_as_out,
    read_before_and_after_a_write,
]


@pytest.mark.parametrize("step", FIXED)
@pytest.mark.parametrize("length", [3, 5])
def test_a_branch_on_a_fixed_number_is_that_of_eager_code(step, length):
    x = torch.arange(float(length))
    assert torch.equal(ftrain.jit(step)(x), step(x))


def written_by_a_norm(x):
    mean, deviation = torch.zeros(3), torch.ones(3)
    torch.nn.functional.batch_norm(torch.ones(4, 3), mean, deviation, training=True)
    return x if (mean > 0).any() else x * 2


def written_with_an_argument(x):
    mask = torch.zeros(3)
    mask[1:].copy_(x[1:])
    return x if mask.any() else x * 2


def written_with_a_draw(x):
    return x if torch.zeros(3).bernoulli_(0.5).any() else x * 2


OTHERS = {
    "written with an argument": written_with_an_argument,
    "written with a draw": written_with_a_draw,
    "by a norm": written_by_a_norm,
    "an argument": lambda x: x if (x > 0).any() else x * 2,
    "like an argument": lambda x: x if torch.ones_like(x).any() else x * 2,
    "captured": lambda x: x if captured.any() else x * 2,
    "drawn": lambda x: x if (torch.rand(3) > 0.5).any() else x * 2,
    "never written": lambda x: x if torch.empty(3).any() else x * 2,
    "a fraction, which devices round differently": lambda x: x if torch.full((3,), 0.1).sum().item() > 0.3 else x * 2,
}


@pytest.mark.parametrize("step", OTHERS.values(), ids=OTHERS)
def test_a_branch_on_any_other_number_is_refused(step):
    with pytest.raises(ValueError, match=r"test_fixed_numbers.py:\d+ .* reads the number in a tensor"):
        ftrain.jit(step)(torch.ones(3))
