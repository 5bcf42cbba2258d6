"""A mean is total over count: for any count but zero, and never by the arithmetic of tuples."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftrain.kernels.mean import Mean, WeightedSum, share, weighted_sum
from ftrain.trace.grad import value_and_grad


@given(total=st.floats(-1e3, 1e3), count=st.floats(1e-30, 1e6))
@example(total=1.0, count=2.0**-120)
def test_any_positive_count_divides(total, count):
    """Sums of weights may be far below one."""
    found = Mean(torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
    assert float(found) == pytest.approx(total / count, rel=1e-12)


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.0, 1.0, width=32), min_size=3, max_size=3), scale=st.sampled_from([1.0, 1e-3, 1e-9])
)
def test_scaling_all_weights_changes_neither_value_nor_gradient(weights, scale):
    x_3, w_3 = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)

    def loss(factor, w_3):
        return Mean((factor * x_3 * w_3).sum(), w_3.sum())

    one = torch.ones((), dtype=torch.float64)
    for got, expected in zip(value_and_grad(loss)(one, w_3 * scale), value_and_grad(loss)(one, w_3), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_empty_term_is_zero_whatever_its_total_holds():
    """Selected, not multiplied: 0 * NaN is NaN."""

    def loss(w):
        away = Mean(w + math.nan, torch.tensor(0))
        return weighted_sum({"here": Mean(w * 6.0, torch.tensor(3)), "away": away}, {})

    value, grad = value_and_grad(loss)(torch.ones(()))
    assert (float(value), float(grad)) == (2.0, 2.0)


def test_shares_are_zero_only_where_there_is_nothing():
    found = share(torch.tensor([3.0, 0.0, 0.25]), torch.tensor([4.0, 0.0, 0.5]))
    assert found.tolist() == [0.75, 0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_values_are_summed_and_counted_wide(dtype):
    """70,000 is beyond float16, in the sum as in the count."""
    assert float(Mean.of(torch.full((70_000,), 2.0, dtype=dtype))) == 2.0
    assert float(Mean(torch.tensor(3.0, dtype=dtype), torch.tensor(70_000))) == pytest.approx(3 / 70_000, rel=1e-2)


def test_numbers_of_python():
    mean = Mean(torch.tensor(3.0), torch.tensor(2))
    assert (float(mean), mean.item(), f"{mean:.3f}") == (1.5, 1.5, "1.500")
    both = weighted_sum({"a": mean, "b": mean}, {"a": 1.0, "b": 2.0})
    assert (float(both), both.item(), f"{both:.1f}") == (4.5, 4.5, "4.5")
    assert float(Mean.pool([mean, Mean(torch.tensor(5.0), torch.tensor(6))])) == 1.0
    with pytest.raises(ValueError, match="no means to pool"):
        Mean.pool([])


@pytest.mark.parametrize(
    "arithmetic",
    [
        lambda a: a + a,
        lambda a: sum([a, a]),
        lambda a: a + 1.0,
        lambda a: torch.ones(()) * a,
        lambda a: 2 * a,
        lambda a: a * 2,
        lambda a: a / 2,
        lambda a: a - a,
        lambda a: -a,
        lambda a: a < a,
        lambda a: a >= 1,
    ],
)
def test_arithmetic_says_what_to_write(arithmetic):
    mean = Mean(torch.tensor(3.0), torch.tensor(2.0))
    for loss in (mean, WeightedSum((mean,), (1.0,))):
        with pytest.raises(ValueError, match=r"ftrain\.weighted_sum.*Mean\.pool.*\.value\(\)"):
            arithmetic(loss)
