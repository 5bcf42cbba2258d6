"""Rows of the batch that other ranks hold: all of them, or a promise not to look at them.

On a mesh a rank's leaves of the batch are its share. A plan rebinds these primitives; on one device the share is the
batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from ftrain.kernels.primitive import primitive

_within: ContextVar[bool] = ContextVar("ftrain_within_documents", default=False)
_unwatched: ContextVar[bool] = ContextVar("ftrain_unwatched_modes", default=False)


@primitive("whole_rows")
def whole_rows(x: Tensor, *, dim: int = 0) -> Tensor:
    """The rows of the whole batch, in its order, of which a rank holds `x` (any shape and dtype): `dim` is as long as
    the batch's. Differentiable: a row's gradient is summed over the ranks that used it.

    For losses of pairs (`q @ whole_rows(k).T`, an InfoNCE): with queries gathered too each rank computes the whole
    batch's loss, and `Mean(total, count)` of it is right. ValueError in a loss of `ftrain.accumulate`, which sees one
    micro-batch. On one device it is the identity.

    >>> import torch
    >>> from ftrain.kernels.whole_batch import whole_rows
    >>> whole_rows(torch.arange(3))
    tensor([0, 1, 2])
    """
    del dim
    return x


@primitive("require_documents_alone")
def require_documents_alone() -> None:
    """ValueError where ranks share a document, so that nothing that reads its other tokens can stay on a rank."""


@contextmanager
def within_documents() -> Iterator[None]:
    """Within the block ops may mix rows of the batch: the caller promises that they stay within documents, as a rank
    has whole ones (a masked product of tokens with tokens, a scan that starts again with each document).

    ValueError on a mesh with a sequence axis, whose ranks share a document. Elsewhere it does nothing.

    >>> import torch
    >>> from ftrain import within_documents
    >>> with within_documents():
    ...     torch.ones(3).cumsum(0)
    tensor([1., 2., 3.])
    """
    require_documents_alone()
    token = _within.set(True)
    try:
        yield
    finally:
        _within.reset(token)


def stays_within_documents() -> bool:
    """True within the block of `within_documents`."""
    return _within.get()


@contextmanager
def unwatched_modes() -> Iterator[None]:
    """Within the block functions that reach torch through a mode (a `TorchFunctionMode`) are not looked at for mixing
    rows of the batch: of the module that runs there something else has shown that it keeps them apart.
    """
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


def modes_are_watched() -> bool:
    """False within the block of `unwatched_modes`."""
    return not _unwatched.get()
