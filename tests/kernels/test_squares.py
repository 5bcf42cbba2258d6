"""Sums of squares of many tensors at once."""

import torch

from kernels.squares import sums_of_squares


def test_each_tensor_has_its_sum():
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in ((), (3,), (4, 5), (2, 0), (70_000,), (2, 3, 4))]
    xs += [xs[2].mT, xs[1].bfloat16()]
    wanted = torch.stack([x.double().square().sum() for x in xs])
    torch.testing.assert_close(sums_of_squares(xs, torch.float64), wanted, rtol=1e-5, atol=0)
    plain = sums_of_squares(xs, torch.float32, backend="reference")
    assert torch.equal(sums_of_squares(xs, torch.float32), plain)


def test_differentiable_where_asked():
    x = torch.randn(4, 3, dtype=torch.float64)
    grad = torch.func.grad(lambda x: sums_of_squares([x, 2 * x], torch.float64).sum())(x)
    torch.testing.assert_close(grad, 10 * x)
