"""The fused AdamW update: equal to its definition, in pieces or not, in place or not."""

import pytest
import torch

from ftrain.kernels import adamw
from ftrain.kernels.adamw import adamw_fused, adamw_in_place, adamw_update, scalars

OPTIONS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
LENGTHS = [0, 1, 5, adamw.PIECE, adamw.PIECE + 7]


def leaf(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, g, m = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(3))
    return p, g, m * 0.1, torch.rand(shape, dtype=dtype, generator=generator) * 0.1


def clock(steps=3, rate=1e-2, dtype=torch.float32):
    return scalars(torch.tensor(steps), rate, b1=0.9, b2=0.999, eps=1e-8, dtype=dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(), (3, 5), *((n,) for n in LENGTHS)], ids=str)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_fused_equals_the_definition(shape, dtype, close, weight_decay):
    tensors, at = leaf(shape, dtype), clock(dtype=dtype)
    fused = adamw_update(*tensors, at, **OPTIONS, weight_decay=weight_decay)
    plain = adamw_update(*tensors, at, **OPTIONS, weight_decay=weight_decay, backend="reference")
    for a, b in zip(fused, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("n", LENGTHS)
def test_in_place_gives_the_same_bits(n):
    p, g, m, v = leaf((n,))
    at = clock()
    numbers = (at.steps, at.rate, 0.9, 0.999, 1e-8, 0.01)
    update, m_new, v_new = adamw_fused(p, g, m, v, *numbers)
    p_new = p + update
    adamw_in_place(p, g, m, v, *numbers)
    for written, pure in ((p, p_new), (m, m_new), (v, v_new)):
        assert torch.equal(written, pure)


def test_arguments_are_left_alone():
    tensors = leaf((adamw.PIECE + 3,))
    before = [x.clone() for x in tensors]
    adamw_update(*tensors, clock(), **OPTIONS, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_strided_leaves():
    tensors = [x.mT for x in leaf((6, 4))]
    dense = [x.contiguous() for x in tensors]
    for a, b in zip(
        adamw_update(*tensors, clock(), **OPTIONS, weight_decay=0.1),
        adamw_update(*dense, clock(), **OPTIONS, weight_decay=0.1),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_mixed_dtypes_keep_theirs():
    p, g, m, v = leaf((9,))
    p, g, m = p.bfloat16(), g.bfloat16(), m.bfloat16()
    fused = adamw_update(p, g, m, v, clock(), **OPTIONS, weight_decay=0.1)
    plain = adamw_update(p, g, m, v, clock(), **OPTIONS, weight_decay=0.1, backend="reference")
    assert [x.dtype for x in fused] == [torch.float32, torch.bfloat16, torch.float32]
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_rate_of_zero_moves_nothing():
    tensors = leaf((7,))
    update, _, _ = adamw_update(*tensors, clock(rate=0.0), **OPTIONS, weight_decay=0.1)
    assert torch.equal(tensors[0] + update, tensors[0])


def test_the_update_is_differentiable_in_the_gradient():
    p, g, m, v = leaf((5,), torch.float64)
    at = clock(dtype=torch.float64)

    def sizes(g):
        return adamw_update(p, g, m, v, at, **OPTIONS, weight_decay=0.1)[0].square().sum()

    by_func, wanted = torch.func.grad(sizes)(g), g.clone().requires_grad_()
    sizes(wanted).backward()
    assert wanted.grad.abs().sum() > 0
    torch.testing.assert_close(by_func, wanted.grad)
