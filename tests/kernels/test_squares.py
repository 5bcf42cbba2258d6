"""Sums of squares and extremes of many tensors at once."""

import torch

from ftrain.kernels.squares import extremes, sums_of_squares


def test_each_tensor_has_its_sum():
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in ((), (3,), (4, 5), (2, 0), (70_000,), (2, 3, 4))]
    xs += [xs[2].mT, xs[1].bfloat16()]
    wanted = torch.stack([x.double().square().sum() for x in xs])
    torch.testing.assert_close(sums_of_squares(xs, torch.float64), wanted, rtol=1e-5, atol=0)
    plain = sums_of_squares(xs, torch.float32, backend="reference")
    assert torch.equal(sums_of_squares(xs, torch.float32), plain)


def test_squares_beyond_float32_are_summed_wider():
    xs = [
        torch.full((3, 4), 1e25),
        torch.tensor([1.0, float("inf")]),
        torch.tensor([float("nan")]),
        torch.ones(5).half(),
    ]
    found = sums_of_squares(xs, torch.float64).tolist()
    torch.testing.assert_close(found[0], 12e50, rtol=1e-6, atol=0)
    assert found[1] == float("inf")
    assert found[2] != found[2]
    assert found[3] == 5


def test_differentiable_where_asked():
    x = torch.randn(4, 3, dtype=torch.float64)
    grad = torch.func.grad(lambda x: sums_of_squares([x, 2 * x], torch.float64).sum())(x)
    torch.testing.assert_close(grad, 10 * x)


def test_extremes_of_each_tensor_and_nan_where_there_is_one():
    nan, inf = float("nan"), float("inf")
    xs = [torch.tensor([[3.0, -2.0], [1.0, 0.5]]).mT, torch.tensor(4.0), torch.tensor([1.0, nan]).bfloat16()]
    xs.append(torch.tensor([inf, -1.0]))
    found = extremes(xs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[-2.0, 3.0], [4, 4], [nan, nan], [-1, inf]]), equal_nan=True)
    torch.testing.assert_close(found, extremes(xs, backend="reference"), equal_nan=True)
