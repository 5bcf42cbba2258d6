"""Rows for a mixture of experts without dropping: sort token slots by expert, and put them back, weighted.

Tokens are sorted and gathered, never scattered with atomics, so every result and gradient is deterministic (as in Gale
et al., "MegaBlocks", arXiv 2211.15841).

Legend: T tokens, K experts per token, N = T * K rows, E experts, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend, device_type
from ftrain.kernels.chunks import PIECE
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op

_BACKENDS = {"cpu": "sorted", "cuda": "sorted"}


class Dispatch(NamedTuple):
    """Where the rows of `moe_dispatch` came from.

    - `order_N`: int64; row n holds slot `order[n]`, which is choice `order % K` of token `order // K`.
    - `offsets_E`: int32; expert e has rows `offsets[e - 1] .. offsets[e]`.
    - `expert_N`: the expert of each row, ascending, in the dtype of the choices.
    """

    order_N: Tensor
    offsets_E: Tensor
    expert_N: Tensor


def moe_dispatch(
    x_TD: Tensor, expert_TK: Tensor, *, num_experts: int, backend: str = "auto"
) -> tuple[Tensor, Dispatch]:
    """Copy each token once for each of its experts: rows `[N, D]` in the dtype of x, sorted by expert and stable by
    token.

    - `x_TD`: tokens.
    - `expert_TK`: integers in [0, num_experts); a token may name an expert twice.
    - `backend`: "auto", "reference" or "sorted".

    Returns the rows and the `Dispatch` that `combine` needs. Differentiable in x to any order; gradients are summed in
    a fixed order. ValueError if the experts are not integers `[T, K]`, and for another backend.

    >>> import torch
    >>> from ftrain.kernels.moe import moe_dispatch
    >>> rows_ND, dispatch = moe_dispatch(torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]]), num_experts=3)
    >>> rows_ND.flatten(), dispatch.offsets_E, dispatch.expert_N
    (tensor([2., 1.]), tensor([1, 2, 2], dtype=torch.int32), tensor([0, 1]))
    """
    _check_routing(x_TD.shape[0], expert_TK)
    expert_N, order_N = torch.sort(expert_TK.reshape(-1), stable=True)
    experts_E = torch.arange(num_experts, dtype=expert_N.dtype, device=expert_N.device)
    offsets_E = torch.searchsorted(expert_N, experts_E, right=True, out_int32=True)
    dispatch = Dispatch(order_N, offsets_E, expert_N)
    if choose_backend(backend, x_TD.device, _BACKENDS) == "reference":
        return x_TD[order_N // expert_TK.shape[1]], dispatch
    return _Spread.apply(x_TD, order_N, expert_TK.shape[1]), dispatch


def combine(rows_ND: Tensor, weights_TK: Tensor, dispatch: Dispatch, *, backend: str = "auto") -> Tensor:
    """The weighted sum of each token's K rows, `[T, D]`, in the order of its choices; the dtype of the rows.

    - `rows_ND`: what the experts made of the rows of `moe_dispatch`.
    - `weights_TK`: floating, a weight for each choice.
    - `backend`: "auto", "reference" or "sorted".

    Sums in float32 (float64 for float64 rows). Differentiable once in rows and weights, the reference to any order.
    ValueError for shapes and backends that do not fit.

    >>> import torch
    >>> from ftrain.kernels.moe import combine, moe_dispatch
    >>> rows_ND, dispatch = moe_dispatch(torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 0], [0, 1]]), num_experts=2)
    >>> combine(10 * rows_ND, torch.tensor([[0.5, 0.5], [1.0, 0.0]]), dispatch).flatten()
    tensor([10., 20.])
    """
    if rows_ND.dim() != 2 or rows_ND.shape[0] != weights_TK.numel() or weights_TK.dim() != 2:
        raise ValueError(
            f"combine: rows {list(rows_ND.shape)} must be [T * K, D] for weights [T, K], got {list(weights_TK.shape)}"
        )
    if choose_backend(backend, rows_ND.device, _BACKENDS) == "reference":
        return combine_reference(rows_ND, weights_TK, dispatch)
    return _Combine.apply(rows_ND, weights_TK, dispatch.order_N)


def combine_reference(rows_ND: Tensor, weights_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """`combine` in plain torch: `[T, D]`, differentiable to any order."""
    return _weighted_sum(rows_ND, weights_TK, dispatch.order_N)


def _weighted_sum(rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
    wide = accumulate_dtype(rows_ND.dtype)
    rows_TKD = rows_ND[_inverse(order_N)].unflatten(0, tuple(weights_TK.shape))
    return (rows_TKD.to(wide) * weights_TK.to(wide)[..., None]).sum(1).to(rows_ND.dtype)


def permute_rows(rows_ND: Tensor, order_N: Tensor) -> Tensor:
    """Row `order[n]` at index n: `[N, D]`, for a permutation `order_N` (int64).

    `restore_rows` is its inverse and its transpose, so gradients are gathers too.

    >>> import torch
    >>> from ftrain.kernels.moe import permute_rows, restore_rows
    >>> order_N = torch.tensor([2, 0, 1])
    >>> rows_ND = permute_rows(torch.tensor([[0.0], [1.0], [2.0]]), order_N)
    >>> rows_ND.flatten(), restore_rows(rows_ND, order_N).flatten()
    (tensor([2., 0., 1.]), tensor([0., 1., 2.]))
    """
    return _Spread.apply(rows_ND, order_N, 1)


def restore_rows(rows_ND: Tensor, order_N: Tensor) -> Tensor:
    """The rows at the indices that they had before `permute_rows`: `[N, D]`, differentiable."""
    return _Collect.apply(rows_ND, order_N, 1)


class _Spread(torch.autograd.Function):
    """Token rows to slots in sorted order; its transpose is `_Collect`."""

    @staticmethod
    def forward(x_TD: Tensor, order_N: Tensor, choices: int) -> Tensor:
        return x_TD.index_select(0, order_N // choices)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, order_N, ctx.choices = inputs
        ctx.save_for_backward(order_N)

    @staticmethod
    def backward(ctx: Any, drows_ND: Tensor) -> Any:
        return _Collect.apply(drows_ND, *ctx.saved_tensors, ctx.choices), None, None


class _Collect(torch.autograd.Function):
    """The sum of each token's rows; its transpose is `_Spread`."""

    @staticmethod
    def forward(rows_ND: Tensor, order_N: Tensor, choices: int) -> Tensor:
        if device_type(rows_ND) == "cpu":
            return _combine(rows_ND, None, order_N, choices)
        return rows_ND.index_select(0, _inverse(order_N)).unflatten(0, (-1, choices)).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, order_N, ctx.choices = inputs
        ctx.save_for_backward(order_N)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor) -> Any:
        return _Spread.apply(dx_TD, *ctx.saved_tensors, ctx.choices), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
        if device_type(rows_ND) == "cpu":
            return _combine(rows_ND, weights_TK, order_N, weights_TK.shape[1])
        return _weighted_sum(rows_ND, weights_TK, order_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> Any:
        rows_ND, weights_TK, order_N = ctx.saved_tensors
        backward = _combine_backward_once if device_type(rows_ND) == "cpu" else _combine_backward_reference
        return *backward(dy_TD, rows_ND, weights_TK, order_N), None


def _combine_backward_reference(
    dy_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by gathers alone, so that no sum is made in an order that varies."""
    wide = accumulate_dtype(rows_ND.dtype)
    dy_ND = dy_TD.index_select(0, order_N // weights_TK.shape[1]).to(wide)
    drows_ND = dy_ND * weights_TK.reshape(-1).index_select(0, order_N).to(wide)[:, None]
    dweights_N = (dy_ND * rows_ND.to(wide)).sum(-1).index_select(0, _inverse(order_N))
    return drows_ND.to(rows_ND.dtype), dweights_N.view(weights_TK.shape).to(weights_TK.dtype)


def _inverse(order_N: Tensor) -> Tensor:
    """Where each slot went: `inverse[order[n]] = n`."""
    rows_N = torch.arange(order_N.shape[0], device=order_N.device)
    return torch.zeros_like(order_N).scatter(0, order_N, rows_N)


def _check_routing(tokens: int, expert_TK: Tensor) -> None:
    if expert_TK.dim() != 2 or expert_TK.shape[0] != tokens or expert_TK.is_floating_point():
        raise ValueError(
            f"moe_dispatch: experts must be integers [T, K] with T={tokens}, got {expert_TK.dtype} "
            f"{list(expert_TK.shape)}"
        )


def _combine_cpu(rows_ND: Tensor, weights_TK: Tensor | None, order_N: Tensor, choices: int) -> Tensor:
    tokens, D = rows_ND.shape[0] // choices, rows_ND.shape[1]
    y_TD = rows_ND.new_empty(tokens, D)
    slot_TK = _inverse(order_N).view(tokens, choices)
    weights_TK = None if weights_TK is None else weights_TK.to(accumulate_dtype(rows_ND.dtype))
    step = max(1, PIECE // max(1, D))
    for t in range(0, tokens, step):
        weights = None if weights_TK is None else weights_TK[t : t + step]
        _combine_piece(rows_ND, weights, slot_TK[t : t + step], y_TD[t : t + step])
    return y_TD


def _combine_piece(rows_ND: Tensor, weights_TK: Tensor | None, slot_TK: Tensor, y_TD: Tensor) -> None:
    total_TD = rows_ND.new_zeros(y_TD.shape, dtype=accumulate_dtype(rows_ND.dtype))
    for k in range(slot_TK.shape[1]):
        rows_TD = rows_ND.index_select(0, slot_TK[:, k])
        if weights_TK is None:
            total_TD.add_(rows_TD)
        else:
            total_TD.addcmul_(rows_TD, weights_TK[:, k : k + 1])
        del rows_TD  # before the next choice's are gathered
    y_TD.copy_(total_TD)


def _combine_backward_cpu(dy_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor) -> tuple[Tensor, Tensor]:
    N, D = rows_ND.shape
    wide = accumulate_dtype(rows_ND.dtype)
    drows_ND, dweights_N = torch.empty_like(rows_ND), rows_ND.new_empty(N, dtype=wide)
    weights_N = weights_TK.reshape(-1).to(wide)
    step = max(1, PIECE // max(1, D))
    for n in range(0, N, step):
        slots, rows, drows = order_N[n : n + step], rows_ND[n : n + step], drows_ND[n : n + step]
        dy = dy_TD.index_select(0, slots // weights_TK.shape[1])
        dweights_N[slots] = _combine_backward_piece(dy.to(wide), rows, weights_N[slots], drows)
        del dy
    return drows_ND, dweights_N.view(weights_TK.shape).to(weights_TK.dtype)


def _combine_backward_piece(dy: Tensor, rows: Tensor, weights: Tensor, drows: Tensor) -> Tensor:
    """Into drows; overwrites dy; returns the gradients of the rows' weights."""
    dweights = (dy * rows).sum(-1)
    drows.copy_(dy.mul_(weights[:, None]))
    return dweights


_combine = opaque_op(
    "combine(Tensor rows, Tensor? weights, Tensor order, int choices) -> Tensor",
    fake=lambda rows, weights, order, choices: rows.new_empty(rows.shape[0] // choices, rows.shape[1]),
)(_combine_cpu)

_combine_backward = opaque_op(
    "combine_backward(Tensor dy, Tensor rows, Tensor weights, Tensor order) -> (Tensor, Tensor)",
    fake=lambda dy, rows, weights, order: (rows.new_empty(rows.shape), weights.new_empty(weights.shape)),
)(_combine_backward_cpu)

_combine_backward_once = first_order(_combine_backward, "combine")


def _piece(rows: Tensor) -> int:
    """Elements of the rows that are worked on at once."""
    return min(rows.numel(), max(1, PIECE // max(1, rows.shape[1])) * rows.shape[1])


def _combine_workspace(rows: Tensor, weights: Tensor | None, order: Tensor, choices: int) -> int:
    """Where each slot went, the running sum, and one choice's rows (16-bit: also in float32)."""
    wide = accumulate_dtype(rows.dtype)
    piece = min(_piece(rows), rows.numel() // max(1, choices))
    narrow = 0 if rows.dtype == wide else rows.element_size()
    return 8 * rows.shape[0] + piece * (2 * wide.itemsize + narrow)


def _combine_backward_workspace(dy: Tensor, rows: Tensor, weights: Tensor, order: Tensor) -> int:
    """The gradient of the piece's rows and its product with them (16-bit: both factors also in float32)."""
    wide = accumulate_dtype(rows.dtype)
    narrow = 0 if rows.dtype == wide else rows.element_size() + wide.itemsize
    return (2 * wide.itemsize + narrow) * _piece(rows)


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::combine": _combine_workspace,
    "ftrain::combine_backward": _combine_backward_workspace,
}
