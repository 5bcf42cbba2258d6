"""The chunk grid: bounded, and with one writer per chunk."""

import math

from hypothesis import given
from hypothesis import strategies as st

from ftrain.checkpoint.chunks import chunk_shape

shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple)


@given(shape=shapes, itemsize=st.sampled_from([1, 2, 4, 8, 16]), limit=st.integers(1, 5000))
def test_a_chunk_is_bounded_and_contiguous(shape, itemsize, limit):
    chunk = chunk_shape(shape, shape, itemsize=itemsize, limit=limit)
    assert all(1 <= c <= max(1, n) for c, n in zip(chunk, shape, strict=True))
    assert math.prod(chunk) * itemsize <= max(limit, itemsize)
    cut = [dim for dim, (c, n) in enumerate(zip(chunk, shape, strict=True)) if c < n]
    assert all(chunk[dim] == 1 for dim in range(max(cut, default=0)))


@given(
    piece=st.lists(st.integers(1, 24), min_size=1, max_size=3).map(tuple),
    parts=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    limit=st.integers(8, 2000),
)
def test_no_chunk_crosses_the_edge_of_a_writers_piece(piece, parts, limit):
    shape = tuple(n * k for n, k in zip(piece, parts, strict=False))
    chunk = chunk_shape(shape, piece, itemsize=8, limit=limit)
    assert math.prod(chunk) * 8 <= 4 * limit
    assert all(n == whole or n % c == 0 for c, n, whole in zip(chunk, piece, shape, strict=True))


def test_chunks_of_a_dim_are_about_equal():
    assert chunk_shape((1000, 1000), (1000, 1000), itemsize=4, limit=1_500_000) == (334, 1000)


def test_a_piece_that_is_hard_to_divide_is_not_cut_into_crumbs():
    """The rows of a vocabulary of 151936 over 8 ranks: 18992 = 16 * 1187."""
    chunk = chunk_shape((151936, 4096), (18992, 4096), itemsize=4, limit=16 * 2**20)
    assert chunk == (1187, 4096)
