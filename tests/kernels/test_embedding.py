"""Lookup and merge against indexing, with padding, repeats and bad indices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels.embedding import embedding, merge_rows

BACKENDS = ["auto", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (0,)])
def test_lookup_is_indexing(shape, dtype, backend):
    tokens, table = torch.randint(0, 9, shape, dtype=dtype), torch.randn(9, 4)
    assert torch.equal(embedding(tokens, table, backend=backend), table[tokens.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_sums_repeats_in_float32(dtype):
    """3000 equal tokens: a sum kept in bfloat16 would stop growing at 256."""
    tokens = torch.cat([torch.full((3000,), 2), torch.tensor([7, 0])])
    table = torch.zeros(9, 4, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(embedding(tokens, table).sum(), table)
    assert gradient.dtype == dtype
    expected = torch.zeros(9)
    expected[[2, 7, 0]] = torch.tensor([3000.0, 1.0, 1.0])
    assert torch.equal(gradient, expected[:, None].expand(9, 4).to(dtype))


@pytest.mark.parametrize(("bad", "where"), [(9, 2), (-1, 4), (1 << 40, 0)])
def test_a_token_out_of_range_is_named(bad, where):
    tokens = torch.zeros(6, dtype=torch.int64)
    tokens[where] = bad
    tokens[5] = 100
    with pytest.raises(ValueError, match=f"token {bad} at index {where} is outside the vocabulary of 9"):
        embedding(tokens, torch.randn(9, 4))


@st.composite
def merges(draw):
    T = draw(st.integers(0, 8))
    places = draw(st.permutations(range(T)).map(lambda p: p[: draw(st.integers(0, T))]))
    dropped = draw(st.integers(0, 3))
    return T, draw(st.permutations([*places, *[T] * dropped]))


@settings(deadline=None, max_examples=60)
@given(merges(), st.sampled_from(BACKENDS))
def test_merge_puts_rows_in_their_places(case, backend):
    T, index = case
    x = torch.randn(T, 2, requires_grad=True)
    rows = torch.randn(len(index), 2, requires_grad=True)
    expected = x.detach().clone()
    for row, i in zip(rows.detach(), index, strict=True):
        if i < T:
            expected[i] = row
    merged = merge_rows(x, rows, torch.tensor(index, dtype=torch.int64), backend=backend)
    assert torch.equal(merged, expected)
    dy = torch.randn(T, 2)
    dx, drows = torch.autograd.grad(merged, (x, rows), dy)
    kept = torch.tensor([t not in index for t in range(T)], dtype=torch.bool)
    assert torch.equal(dx, dy * kept[:, None])
    assert torch.equal(drows, torch.cat([dy, torch.zeros(1, 2)])[index])


def test_merge_leaves_its_inputs_alone():
    x, rows = torch.zeros(3, 2), torch.ones(1, 2)
    merge_rows(x, rows, torch.tensor([1]))
    assert x.abs().sum() == 0


X, ROWS = torch.ones(4, 2), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedding(torch.ones(3), torch.ones(9, 4)), "float32"),
        (lambda: embedding(torch.ones(3).long(), torch.ones(9)), r"\[9\]"),
        (lambda: merge_rows(X, ROWS, torch.tensor([0, 5, 1])), r"index 5 of row 1 is outside \[0, 4\]"),
        (lambda: merge_rows(X, ROWS, torch.tensor([0, -1, 1])), r"index -1 of row 1"),
        (lambda: merge_rows(X, ROWS, torch.tensor([3, 0, 3])), "2 rows go to index 3"),
        (lambda: merge_rows(X, ROWS, torch.tensor([3, 0])), r"int64 \[3\], got torch.int64 \[2\]"),
        (lambda: merge_rows(X, ROWS.double(), torch.tensor([3, 0, 1])), "float64"),
        (lambda: merge_rows(X, torch.ones(3, 5), torch.tensor([3, 0, 1])), r"\[3, 5\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
