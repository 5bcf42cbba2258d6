"""Attention of a run of queries to a run of keys of the same document, next to the dense definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels import attention_rectangle
from ftrain.kernels.attention_rectangle import Band, tiles


def dense(q, k, v, band):
    """Output and log-sum-exp by definition."""
    cap = band.softcap
    R = q.shape[1] // k.shape[1]
    far = torch.arange(q.shape[0])[:, None] + band.offset - torch.arange(k.shape[0])
    scores = torch.einsum("lhk,mhk->hlm", q, k.repeat_interleave(R, 1)) * band.scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    if band.window is not None:
        scores = scores.masked_fill(far.abs() >= band.window, -torch.inf)
    return torch.einsum("hlm,mhv->lhv", scores.softmax(-1), v.repeat_interleave(R, 1)), scores.logsumexp(-1)


CASES = [
    (5, 7, 7, None),
    (5, 7, -5, None),
    (300, 200, 200, None),
    (200, 300, 300, 290),
    (300, 200, -300, 290),
    (300, 200, 200, 350),
    (260, 260, 260, 260),
    (150, 20, 20, 170),
]


@pytest.mark.parametrize(("V", "softcap"), [(8, None), (6, None), (8, 0.7)])
@pytest.mark.parametrize(("L", "M", "offset", "window"), CASES)
def test_equals_the_definition(L, M, offset, window, V, softcap):
    generator = torch.Generator().manual_seed(0)
    shapes = ((L, 4, 8), (M, 2, 8), (M, 2, V), (L, 4, V))
    q, k, v, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    first = max(0, -offset - (window or L + M) + 1)  # a query before that sees no key, which the function excludes
    last = L if window is None else min(L, M - 1 + window - offset)
    q, grad, band = q[first:last].requires_grad_(), grad[first:last], Band(offset + first, window, 0.3, softcap)
    k, v = k.requires_grad_(), v.requires_grad_()
    wanted, lse = dense(q, k, v, band)
    got = attention_rectangle.forward(q.detach(), k.detach(), v.detach(), band)
    torch.testing.assert_close(got, (wanted.detach(), lse.detach()), rtol=1e-12, atol=1e-12)
    grads = attention_rectangle.backward(grad, q.detach(), k.detach(), v.detach(), *got, band)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, (q, k, v), grad), rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 2, 8, generator=generator).bfloat16() for _ in range(3))
    out, lse = attention_rectangle.forward(q, k, v, Band(40, None, 0.3))
    wanted, wanted_lse = dense(q.float(), k.float(), v.float(), Band(40, None, 0.3))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted.bfloat16())
    torch.testing.assert_close(lse, wanted_lse)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.booleans(), st.integers(1, 900), st.booleans())
def test_tiles_cover_each_visible_pair_once(L, M, keys_first, window, fused):
    offset = M if keys_first else -L
    last_seen = min(L, M - 1 + window - offset) if keys_first else L
    first_seen = 0 if keys_first else max(0, L - window + 1)
    band = Band(offset + first_seen, window, 1.0)
    rows = last_seen - first_seen
    if rows <= 0:
        return
    far = torch.arange(rows)[:, None] + band.offset - torch.arange(M)
    covered = torch.zeros(rows, M, dtype=torch.int64)
    for tile in tiles(rows, M, band, fused):
        assert tile.L > 0
        assert tile.M > 0
        covered[tile.i : tile.i + tile.L, tile.j : tile.j + tile.M] += 1
    assert covered.max() == 1
    assert covered[far.abs() < window].all()
