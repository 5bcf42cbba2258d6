"""Rows of a table by token, and rows put into a sequence in place of others.

Legend: T tokens, V vocabulary, D model, N rows to put in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.primitive import primitive
from ftrain.kernels.stand_in import asks_stand_ins

# On CUDA the reference: checking an index would make the host wait, and ATen's own backward is deterministic.
_BACKENDS = {"cpu": "cpu"}


@asks_stand_ins
@primitive("embedding")
def embedding(tokens_T: Tensor, table_VD: Tensor, *, backend: str = "auto") -> Tensor:
    """`table[token]`: rows of the table, `[T, D]` in its dtype (`[..., D]` for tokens of any shape).

    - `tokens_T`: int64 or int32, in [0, V).
    - `table_VD`: the table; its gradient is dense, summed in float32 (float64) and in a fixed order.
    - `backend`: "auto", "reference" or "cpu".

    "cpu" is differentiable once, the reference to any order. ValueError for dtypes, shapes and backends that do not
    fit, and on a CPU for a token outside of the vocabulary (CUDA: a device-side assertion).

    >>> import torch
    >>> from ftrain.kernels.embedding import embedding
    >>> embedding(torch.tensor([2, 0]), torch.tensor([[0.0], [1.0], [2.0]])).flatten()
    tensor([2., 0.])
    """
    if tokens_T.dtype not in (torch.int64, torch.int32) or table_VD.dim() != 2:
        raise ValueError(
            f"embedding: tokens must be int64 or int32 and the table [V, D], got {tokens_T.dtype} and "
            f"{list(table_VD.shape)}"
        )
    if choose_backend(backend, table_VD.device, _BACKENDS) == "reference":
        return embedding_reference(tokens_T, table_VD)
    return _Embedding.apply(tokens_T, table_VD)


def embedding_reference(tokens_T: Tensor, table_VD: Tensor) -> Tensor:
    """`embedding` in plain torch: `[..., D]`, differentiable to any order."""
    return torch.nn.functional.embedding(tokens_T, table_VD)


@primitive("merge")
def merge_rows(x_TD: Tensor, rows_ND: Tensor, index_N: Tensor, *, backend: str = "auto") -> Tensor:
    """x with `x[index[n]] = rows[n]`: a new tensor `[T, D]`, differentiable in both. Media enter a sequence of tokens
    by it.

    - `x_TD`, `rows_ND`: one dtype.
    - `index_N`: int64 in [0, T]. A row whose index is T is dropped, so a fixed budget of rows can be padded. The others
      must be distinct.
    - `backend`: "auto", "reference" or "cpu".

    "cpu" is differentiable once, the reference to any order. ValueError for shapes, dtypes and backends that do not
    fit, and on a CPU for an index out of range or given twice.

    >>> import torch
    >>> from ftrain.kernels.embedding import merge_rows
    >>> merge_rows(torch.zeros(3, 1), torch.tensor([[5.0], [6.0]]), torch.tensor([2, 3])).flatten()
    tensor([0., 0., 5.])
    """
    _check_merge(x_TD, rows_ND, index_N)
    if choose_backend(backend, x_TD.device, _BACKENDS) == "reference":
        return merge_rows_reference(x_TD, rows_ND, index_N)
    return _Merge.apply(x_TD, rows_ND, index_N)


def merge_rows_reference(x_TD: Tensor, rows_ND: Tensor, index_N: Tensor) -> Tensor:
    """`merge_rows` in plain torch: `[T, D]`, differentiable to any order."""
    padded = torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])
    return padded.index_copy(0, index_N, rows_ND)[:-1]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(tokens_T: Tensor, table_VD: Tensor) -> Tensor:
        return _lookup(tokens_T, table_VD)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tokens_T, table_VD = inputs
        ctx.vocabulary = table_VD.shape[0]
        ctx.save_for_backward(tokens_T)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> Any:
        (tokens_T,) = ctx.saved_tensors
        return None, _lookup_backward_once(dy_TD, tokens_T, ctx.vocabulary)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, rows_ND: Tensor, index_N: Tensor) -> Tensor:
        return _merge(x_TD, rows_ND, index_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> Any:
        return *_merge_backward_once(dy_TD, *ctx.saved_tensors), None


def _check_merge(x_TD: Tensor, rows_ND: Tensor, index_N: Tensor) -> None:
    if x_TD.dim() != 2 or rows_ND.dim() != 2 or x_TD.shape[1] != rows_ND.shape[1] or x_TD.dtype != rows_ND.dtype:
        raise ValueError(
            f"merge_rows: x [T, D] and rows [N, D] must share D and dtype, got {x_TD.dtype} {list(x_TD.shape)} and "
            f"{rows_ND.dtype} {list(rows_ND.shape)}"
        )
    if index_N.shape != rows_ND.shape[:1] or index_N.dtype != torch.int64:
        raise ValueError(
            f"merge_rows: index must be int64 [{rows_ND.shape[0]}], got {index_N.dtype} {list(index_N.shape)}"
        )


def _lookup_cpu(tokens: Tensor, table_VD: Tensor) -> Tensor:
    flat_N, V = tokens.reshape(-1), table_VD.shape[0]
    if flat_N.numel():
        low, high = (int(bound) for bound in torch.aminmax(flat_N))
        if low < 0 or high >= V:
            first = int(torch.nonzero((flat_N < 0) | (flat_N >= V))[0])
            raise ValueError(f"embedding: token {int(flat_N[first])} at index {first} is outside the vocabulary of {V}")
    return table_VD.index_select(0, flat_N).view(*tokens.shape, table_VD.shape[1])


def _lookup_backward_cpu(dy: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    flat_N, dy_ND = tokens.reshape(-1), dy.reshape(-1, dy.shape[-1])
    if dy.dtype in (torch.float32, torch.float64):
        return torch.ops.aten.embedding_dense_backward(dy_ND, flat_N, vocabulary, -1, False)
    # Sum in float32 only the rows of tokens that occur, then round once.
    seen_U, which_N = torch.unique(flat_N, return_inverse=True)
    sum_UD = torch.ops.aten.embedding_dense_backward(dy_ND.float(), which_N, seen_U.shape[0], -1, False)
    return dy.new_zeros(vocabulary, dy.shape[-1]).index_copy_(0, seen_U.long(), sum_UD.to(dy.dtype))


def _merge_cpu(x_TD: Tensor, rows_ND: Tensor, index_N: Tensor) -> Tensor:
    _check_index(index_N, x_TD.shape[0])
    y_TD = x_TD.clone(memory_format=torch.contiguous_format)
    if int((kept_N := index_N < x_TD.shape[0]).sum()) == len(index_N):
        return y_TD.index_copy_(0, index_N, rows_ND)
    return y_TD.index_copy_(0, index_N[kept_N], rows_ND[kept_N])


def _merge_backward_cpu(dy_TD: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    kept_N = index_N < dy_TD.shape[0]
    dx_TD = dy_TD.clone(memory_format=torch.contiguous_format).index_fill_(0, index_N[kept_N], 0)
    if not dy_TD.shape[0]:
        return dx_TD, dy_TD.new_zeros(len(index_N), dy_TD.shape[1])
    drows_ND = dy_TD.index_select(0, torch.where(kept_N, index_N, 0))
    return dx_TD, drows_ND.masked_fill_(~kept_N[:, None], 0)


def _check_index(index_N: Tensor, tokens: int) -> None:
    """Raise for an index outside [0, T] or one below T that comes twice."""
    if not index_N.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(index_N))
    if low < 0 or high > tokens:
        first = int(torch.nonzero((index_N < 0) | (index_N > tokens))[0])
        raise ValueError(f"merge_rows: index {int(index_N[first])} of row {first} is outside [0, {tokens}]")
    count_T = torch.bincount(index_N, minlength=tokens + 1)[:tokens]
    if tokens and int(count_T.max()) > 1:
        raise ValueError(f"merge_rows: {int(count_T.max())} rows go to index {int(count_T.argmax())}, must be one")


_lookup = opaque_op(
    "embedding(Tensor tokens, Tensor table) -> Tensor",
    fake=lambda tokens, table: table.new_empty((*tokens.shape, table.shape[1])),
)(_lookup_cpu)

_lookup_backward = opaque_op(
    "embedding_backward(Tensor dy, Tensor tokens, SymInt vocabulary) -> Tensor",
    fake=lambda dy, tokens, vocabulary: dy.new_empty(vocabulary, dy.shape[-1]),
)(_lookup_backward_cpu)

_merge = opaque_op(
    "merge_rows(Tensor x, Tensor rows, Tensor index) -> Tensor",
    fake=lambda x, rows, index: x.new_empty(x.shape),
)(_merge_cpu)

_merge_backward = opaque_op(
    "merge_rows_backward(Tensor dy, Tensor index) -> (Tensor, Tensor)",
    fake=lambda dy, index: (dy.new_empty(dy.shape), dy.new_empty(index.shape[0], dy.shape[1])),
)(_merge_backward_cpu)

_lookup_backward_once = first_order(_lookup_backward, "embedding")
_merge_backward_once = first_order(_merge_backward, "merge_rows")


def _lookup_backward_workspace(dy: Tensor, tokens: Tensor, vocabulary: int) -> int:
    """16-bit gradients: a float32 copy, and the sums of the tokens that occur (at most: all), before the output is."""
    D, item = dy.shape[-1], dy.element_size()
    if item >= 4:
        return 0 if dy.is_contiguous() else dy.numel() * item
    seen = min(tokens.numel(), vocabulary) * D
    return max(4 * dy.numel() + 4 * seen + 16 * tokens.numel() - vocabulary * D * item, (4 + item) * seen)


def _merge_workspace(x: Tensor, rows: Tensor, index: Tensor) -> int:
    """A copy of the rows that are kept, if not all are."""
    return rows.numel() * rows.element_size() + 9 * index.numel()


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::embedding_backward": _lookup_backward_workspace,
    "ftrain::merge_rows": _merge_workspace,
}
