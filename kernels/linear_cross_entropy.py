"""Cross entropy of `x @ w` against labels, without ever holding the logits of all tokens.

T tokens, D model, V vocabulary, c tokens of a chunk, r of a block of its rows.

The forward makes the logits of one chunk of tokens at a time and turns them, in place, into their own gradient: loss
and gradients come from one pass, and the backward only multiplies by the gradient of the loss.
Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", arXiv 2410.10989, section 3.2.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.stand_in import asks_stand_ins

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

BACKENDS = {"cpu": "chunked", "cuda": "chunked"}

CHUNK_BYTES = 48 * 2**20
"""Size of the float32 logits of one chunk."""

FEWEST_TOKENS = 256
"""A chunk is never smaller: each reads the whole weight and adds to its whole gradient, next to their products."""

ROW_BLOCK_BYTES = 2 * 2**20
"""Logits that a CPU makes exponentials of in one go: they stay in its cache from the first op to the last."""

ROUND_TOKENS = 64
"""Tokens of a chunk are a multiple, as the blocks of matmuls are."""


@asks_stand_ins
def linear_cross_entropy(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    weights_T: Tensor | None = None,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum over tokens of `weight * (logsumexp(z) - z[label])` with `z = x @ w`: a 0-d tensor in nats.

    - `x_TD`, `w_DV`: one floating dtype. `transposed`: the weight is given as `[V, D]` (a tied embedding).
    - `labels_T` int64: in `[0, V)`, or `ignore_index`, which adds nothing to the loss or any gradient.
    - `weights_T`: floating, a factor per token, 1 if None; differentiable.
    - `softcap`: `z` becomes `softcap * tanh(z / softcap)` (Gemma 2, arXiv 2408.00118).
    - `chunk_tokens`: tokens per chunk; if None, as many as 48 MiB of logits hold, and at least 256.
    - `backend`: "auto", "reference" or "chunked".

    The result is float32 (float64 for float64 inputs), as are logits and softmax; matmuls run in the dtype of the
    inputs and the gradient of the weight is accumulated in that of the result. All labels ignored gives zero loss and
    zero gradients. Differentiable once; `"auto"` takes the reference under `vmap`, `jvp` and nested `grad`. ValueError
    for shapes, dtypes and backends that do not fit, and for a label out of range (CUDA: a device-side assertion).
    Source: Hsu et al., arXiv 2410.10989, section 3.2.

    >>> import torch
    >>> from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
    >>> linear_cross_entropy(torch.zeros(3, 2), torch.ones(2, 4), torch.tensor([0, 3, -100]))  # 2 log 4
    tensor(2.7726)
    """
    check_arguments(x_TD, w_DV, labels_T, weights_T, softcap, transposed, chunk_tokens)
    if choose_backend(backend, x_TD.device, BACKENDS) == "reference":
        return linear_cross_entropy_reference(
            x_TD,
            w_DV,
            labels_T,
            ignore_index=ignore_index,
            weights_T=weights_T,
            softcap=softcap,
            transposed=transposed,
        )
    chunk = chunk_tokens or default_chunk(x_TD.shape[0], w_DV.shape[0 if transposed else 1])
    options = Options(ignore_index, softcap, transposed, chunk)
    need_x, need_w = x_TD.requires_grad, w_DV.requires_grad
    need_weights = weights_T is not None and weights_T.requires_grad
    if not torch.is_grad_enabled() or not (need_x or need_w or need_weights):
        return linear_cross_entropy_loss(x_TD, w_DV, labels_T, weights_T, *options)
    return _LinearCrossEntropy.apply(x_TD, w_DV, labels_T, weights_T, options, need_x, need_w)[0]


def linear_cross_entropy_reference(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    weights_T: Tensor | None = None,
    softcap: float | None = None,
    transposed: bool = False,
) -> Tensor:
    """The definition of `linear_cross_entropy`, with its arguments: 0-d, in the accumulation dtype.

    All logits `[T, V]` at once; any number of derivatives, any transform. Nothing is checked.
    """
    valid_T = labels_T != ignore_index
    x_TD = torch.where(valid_T[..., None], x_TD, 0)  # an ignored row may hold NaN, and 0 * NaN is NaN
    z_TV = (x_TD @ (w_DV.mT if transposed else w_DV)).to(accumulate_dtype(x_TD.dtype))
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    label_T = torch.where(valid_T, labels_T, 0)
    loss_T = z_TV.logsumexp(-1) - z_TV.gather(-1, label_T[..., None])[..., 0]
    factor_T = valid_T.to(z_TV.dtype) if weights_T is None else torch.where(valid_T, weights_T, 0).to(z_TV.dtype)
    return (loss_T * factor_T).sum()


def default_chunk(T: int, V: int) -> int:
    """Tokens of a chunk, for T tokens and V logits of each."""
    fitting = CHUNK_BYTES // (4 * max(V, 1)) // ROUND_TOKENS * ROUND_TOKENS
    return min(max(fitting, FEWEST_TOKENS), max(T, 1))


class Options(NamedTuple):
    """What the ops take besides tensors; `chunk` is a number of tokens."""

    ignore_index: int
    softcap: float | None
    transposed: bool
    chunk: int


@opaque_op(
    "linear_cross_entropy_loss(Tensor x, Tensor w, Tensor labels, Tensor? weights, int ignore_index, float? softcap, "
    "bool transposed, int chunk) -> Tensor",
    fake=lambda x, *_: x.new_empty((), dtype=accumulate_dtype(x.dtype)),
)
def linear_cross_entropy_loss(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    weights_T: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    transposed: bool,
    chunk: int,
) -> Tensor:
    """The loss alone, 0-d in the accumulation dtype, as one opaque op; the weight is `[V, D]` if `transposed`.

    `chunk`: tokens per chunk; the other arguments are those of `linear_cross_entropy`. ValueError for a label out of
    range on a CPU.
    """
    w_DV = w_DV.t() if transposed else w_DV
    _check_labels(labels_T, ignore_index, w_DV.shape[1])
    loss_T = torch.zeros(x_TD.shape[0], dtype=accumulate_dtype(x_TD.dtype), device=x_TD.device)
    memory_cV = _memory(x_TD, w_DV, chunk)
    for at in _chunks(labels_T, ignore_index, chunk):
        loss_T[at] = _chunk_loss(x_TD[at], w_DV, _safe(labels_T[at], ignore_index), softcap, memory_cV)
    loss_T = torch.where(labels_T == ignore_index, 0, loss_T)
    return (loss_T * _factors(labels_T, weights_T, ignore_index, loss_T.dtype)).sum()


def _grads_fake(
    x: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_w, dtype = *rest[-2:], accumulate_dtype(x.dtype)
    dx, dw = x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape if need_w else 0)
    return x.new_empty((), dtype=dtype), dx, dw, x.new_empty(x.shape[0], dtype=dtype)


@opaque_op(
    "linear_cross_entropy_grads(Tensor x, Tensor w, Tensor labels, Tensor? weights, int ignore_index, float? softcap, "
    "bool transposed, int chunk, bool need_x, bool need_w) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_grads_fake,
)
def linear_cross_entropy_grads(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    weights_T: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    transposed: bool,
    chunk: int,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients by `x` and `w` (empty where not needed), and the unweighted loss of each token `[T]`.

    The gradients have the shapes and dtypes of `x` and `w`, the losses the accumulation dtype. `chunk`: tokens per
    chunk; the other arguments are those of `linear_cross_entropy`. ValueError for a label out of range on a CPU.
    """
    dtype = accumulate_dtype(x_TD.dtype)
    factor_T = _factors(labels_T, weights_T, ignore_index, dtype)
    loss_T = torch.zeros_like(factor_T)
    dx_TD = torch.zeros(x_TD.shape if need_x else 0, dtype=x_TD.dtype, device=x_TD.device)
    dw = torch.zeros(w_DV.shape if need_w else 0, dtype=dtype, device=w_DV.device)
    w_DV, dw_DV = (w_DV.t(), dw.t() if need_w else dw) if transposed else (w_DV, dw)
    _check_labels(labels_T, ignore_index, w_DV.shape[1])
    memory_cV = _memory(x_TD, w_DV, chunk)
    for at in _chunks(labels_T, ignore_index, chunk):
        x_cD, label_c = x_TD[at], _safe(labels_T[at], ignore_index)
        loss_T[at], dz_cV = _chunk_gradient(x_cD, w_DV, label_c, factor_T[at], softcap, memory_cV)
        if dz_cV.dtype != x_TD.dtype:
            dz_cV = memory_cV[: len(dz_cV)].copy_(dz_cV)
        if need_x:
            dx_TD[at] = dz_cV @ w_DV.mT
        if need_w:
            _add_product(dw_DV, x_cD, dz_cV)
        del dz_cV  # or it lives on while the next chunk makes its own
    del memory_cV  # or it stands beside both forms of dw below
    loss_T = torch.where(labels_T == ignore_index, 0, loss_T)
    return (loss_T * factor_T).sum(), dx_TD, dw.to(w_DV.dtype), loss_T


def _chunks(labels_T: Tensor, ignore_index: int, chunk: int) -> Iterator[slice | Tensor]:
    """Which tokens are computed together. On CPU ignored tokens are left out; CUDA would have to wait to know them."""
    T = labels_T.shape[0]
    valid = None if labels_T.is_cuda else (labels_T != ignore_index).nonzero().flatten()
    if valid is None or len(valid) == T:
        yield from (slice(i, min(i + chunk, T)) for i in range(0, T, chunk))
    else:
        yield from valid.split(chunk) if len(valid) else ()


def _factors(labels_T: Tensor, weights_T: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The factor of each token's loss: its weight, or zero."""
    valid_T = labels_T != ignore_index
    return valid_T.to(dtype) if weights_T is None else torch.where(valid_T, weights_T.to(dtype), 0)


def _safe(label_c: Tensor, ignore_index: int) -> Tensor:
    return torch.where(label_c == ignore_index, 0, label_c)


def _memory(x_TD: Tensor, w_DV: Tensor, chunk: int) -> Tensor:
    """Room for the logits of one chunk, for all chunks in turn: memory that was just used needs no page faults."""
    return x_TD.new_empty(min(chunk, x_TD.shape[0]), w_DV.shape[1])


def _logits(x_cD: Tensor, w_DV: Tensor, memory_cV: Tensor) -> Tensor:
    """`[c, V]`, in `memory_cV` if that has their dtype."""
    return torch.mm(x_cD, w_DV, out=memory_cV[: len(x_cD)]).to(accumulate_dtype(x_cD.dtype))


def _chunk_loss(x_cD: Tensor, w_DV: Tensor, label_c: Tensor, softcap: float | None, memory_cV: Tensor) -> Tensor:
    """The loss of each token, `[c]`; overwrites `memory_cV`."""
    z_cV = _logits(x_cD, w_DV, memory_cV)
    loss_c = z_cV.new_empty(len(z_cV))
    for r in _row_blocks(z_cV):
        loss_c[r] = _exponentials(z_cV[r], label_c[r], softcap)[0]
    return loss_c


def _chunk_gradient(
    x_cD: Tensor, w_DV: Tensor, label_c: Tensor, factor_c: Tensor, softcap: float | None, memory_cV: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss `[c]`, and the gradient of the weighted loss by the logits before the softcap `[c, V]`.

    Overwrites `memory_cV`, in which the gradient is if it has its dtype.
    """
    z_cV = _logits(x_cD, w_DV, memory_cV)
    loss_c = z_cV.new_empty(len(z_cV))
    for r in _row_blocks(z_cV):
        z_rV = z_cV[r]
        loss_c[r], sum_r1, slope_rV = _exponentials(z_rV, label_c[r], softcap, slope=True)
        z_rV.mul_(factor_c[r, None] / sum_r1)
        z_rV.scatter_add_(1, label_c[r, None], -factor_c[r, None])
        if slope_rV is not None:
            z_rV.mul_(slope_rV)
        del slope_rV  # or it lives on while the next block makes its own
    return loss_c, z_cV


def _row_blocks(z_cV: Tensor) -> Iterator[slice]:
    """Rows that are read and written several times while they lie in a CPU's cache; on CUDA all at once."""
    c = len(z_cV)
    rows = c if z_cV.is_cuda else rows_together(c, z_cV.shape[1], z_cV.element_size())
    yield from (slice(i, i + rows) for i in range(0, c, max(1, rows)))


def rows_together(c: int, V: int, itemsize: int) -> int:
    """Rows of a block, for `c` rows of `V` logits of `itemsize` bytes each."""
    return min(c, max(1, ROW_BLOCK_BYTES // (V * itemsize)))


def _exponentials(
    z_rV: Tensor, label_r: Tensor, softcap: float | None, slope: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make `exp(z - max)` of each row of logits, in place: loss `[r]`, sums `[r, 1]`, and the softcap's slope `[r, V]`
    if asked for.
    """
    slope_rV = None
    if softcap is not None:
        z_rV.div_(softcap).tanh_()
        slope_rV = z_rV.square().neg_().add_(1) if slope else None
        z_rV.mul_(softcap)
    z_rV.sub_(z_rV.amax(1, keepdim=True))
    picked_r = z_rV.gather(1, label_r[:, None])[:, 0]
    z_rV.exp_()
    sum_r1 = z_rV.sum(1, keepdim=True)
    return sum_r1[:, 0].log() - picked_r, sum_r1, slope_rV


def _add_product(dw_DV: Tensor, x_cD: Tensor, dz_cV: Tensor) -> None:
    """`dw += x^T dz`. Half precision products are added to the float32 sum by rows, so that no second copy is held."""
    if dw_DV.dtype == x_cD.dtype:
        dw_DV.addmm_(x_cD.t(), dz_cV)
        return
    for some_DV, some_cD in zip(dw_DV.split(len(x_cD)), x_cD.split(len(x_cD), dim=1), strict=True):
        some_DV.add_(some_cD.t() @ dz_cV)


def _scaled(
    grad: Tensor, dx: Tensor, dw: Tensor, loss_T: Tensor, x: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times that of the loss; `x` and `w` only say what a second derivative would be taken by."""
    return (dx * grad).to(dx.dtype), (dw * grad).to(dw.dtype), loss_T * grad


_scale = first_order(_scaled, "linear_cross_entropy")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, options: Options, need_x: bool, need_w: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return linear_cross_entropy_grads(x, w, labels, weights, *options, need_x, need_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        x, w, _labels, weights, _options, *ctx.need = inputs
        _, dx, dw, loss_T = output
        ctx.mark_non_differentiable(dx, dw, loss_T)
        ctx.save_for_backward(x, w, weights, dx, dw, loss_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, w, weights, dx, dw, loss_T = ctx.saved_tensors
        scaled_x, scaled_w, scaled_loss_T = _scale(grad, dx, dw, loss_T, x, w)
        dweights = None if weights is None else scaled_loss_T.to(weights.dtype)
        return scaled_x if ctx.need[0] else None, scaled_w if ctx.need[1] else None, None, dweights, None, None, None


def _check_labels(labels_T: Tensor, ignore_index: int, V: int) -> None:
    bad_T = (labels_T != ignore_index) & ((labels_T < 0) | (labels_T >= V))
    message = f"linear_cross_entropy: a label is neither in [0, {V}) nor ignore_index={ignore_index}"
    if labels_T.is_cuda:
        torch._assert_async(~bad_T.any(), message)
    elif bad_T.any():
        at = int(bad_T.nonzero()[0])
        raise ValueError(f"{message}: label {int(labels_T[at])} at token {at}")


def check_arguments(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    weights_T: Tensor | None,
    softcap: float | None,
    transposed: bool,
    chunk_tokens: int | None,
) -> None:
    """ValueError for arguments of `linear_cross_entropy` that do not fit."""
    layout = "[V, D]" if transposed else "[D, V]"
    if x_TD.dim() != 2 or w_DV.dim() != 2 or x_TD.shape[1] != w_DV.shape[1 if transposed else 0]:
        shapes = f"x {tuple(x_TD.shape)}, w {tuple(w_DV.shape)}"
        raise ValueError(f"linear_cross_entropy wants x [T, D] and w {layout} (transposed={transposed}); got {shapes}")
    if x_TD.dtype != w_DV.dtype or not x_TD.is_floating_point():
        raise ValueError(f"linear_cross_entropy: x is {x_TD.dtype}, w {w_DV.dtype}; they must be one floating dtype")
    T = x_TD.shape[0]
    if labels_T.shape != (T,) or labels_T.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels must be int64 [{T}], not {labels_T.dtype} {[*labels_T.shape]}")
    if weights_T is not None and (weights_T.shape != (T,) or not weights_T.is_floating_point()):
        raise ValueError(f"linear_cross_entropy: weights must be floating [{T}], not {[*weights_T.shape]}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"linear_cross_entropy: softcap={softcap} must be positive, or None")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens={chunk_tokens} must be at least 1, or None")
