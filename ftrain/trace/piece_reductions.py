"""Torch's composite reductions on a piece of a divided array, written as sums, means and extremes.

Sums, means and extremes of pieces can be finished over the ranks that hold the other pieces, so these reductions need
no gathered array. A variance takes two passes, the mean first, because one pass would lose digits. In all functions the
input is a rank's piece, of any shape, and arguments, result and dtypes are those of torch's function.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Dims = int | Sequence[int] | None


def var(
    x: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> Tensor:
    """`torch.var` of a real tensor of any shape."""
    return _var_mean(x, dim, unbiased, keepdim, correction)[0]


def std(
    x: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> Tensor:
    """`torch.std` of a real tensor of any shape."""
    return _var_mean(x, dim, unbiased, keepdim, correction)[0].sqrt()


def var_mean(
    x: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> tuple[Tensor, Tensor]:
    """`torch.var_mean` of a real tensor of any shape."""
    return _var_mean(x, dim, unbiased, keepdim, correction)


def std_mean(
    x: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float | None = None
) -> tuple[Tensor, Tensor]:
    """`torch.std_mean` of a real tensor of any shape."""
    variance, mean = _var_mean(x, dim, unbiased, keepdim, correction)
    return variance.sqrt(), mean


def _var_mean(
    x: Tensor, dim: Any, unbiased: bool | None, keepdim: bool, correction: float | None
) -> tuple[Tensor, Tensor]:
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None or unbiased else 0
    dims = _dims(x, dim)
    mean = x.mean(dims, keepdim=True)
    count = math.prod(x.shape[d] for d in dims)
    left = max(count - correction, 0)
    total = (x - mean).abs().square().sum(dims, keepdim=keepdim)
    return total / left, mean if keepdim else _without(mean, dims)


def _without(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.squeeze(tuple(dims)) if dims else x


def _dims(x: Tensor, dim: _Dims) -> list[int]:
    listed = range(x.dim()) if dim is None or dim == () or dim == [] else [dim] if isinstance(dim, int) else dim
    return sorted(d % max(1, x.dim()) for d in listed)


def count_nonzero(x: Tensor, dim: _Dims = None) -> Tensor:
    """`torch.count_nonzero` of a tensor of any shape."""
    return (x != 0).sum(_dims(x, dim))


def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    """`torch.aminmax` of a tensor of any shape."""
    dims = _dims(x, dim)
    return torch.return_types.aminmax((x.amin(dims, keepdim), x.amax(dims, keepdim)))


def logsumexp(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """`torch.logsumexp` of a tensor of any shape; integers are converted to the default dtype."""
    dims = _dims(x, dim)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    largest = _finite(x.amax(dims, keepdim=True))
    total = (x - largest).exp().sum(dims, keepdim=keepdim).log()
    return total + (largest if keepdim else _without(largest, dims))


def softmax(x: Tensor, dim: int, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    """`torch.softmax` of a tensor of any shape; the maximum is subtracted first."""
    x = x if _dtype(args, dtype) is None else x.to(_dtype(args, dtype))
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def log_softmax(x: Tensor, dim: int, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    """`torch.log_softmax` of a tensor of any shape."""
    x = x if _dtype(args, dtype) is None else x.to(_dtype(args, dtype))
    below = x - x.amax(dim, keepdim=True)
    return below - below.exp().sum(dim, keepdim=True).log()


def _dtype(args: Sequence[Any], dtype: torch.dtype | None) -> torch.dtype | None:
    return next((a for a in args if isinstance(a, torch.dtype)), dtype)


def _finite(x: Tensor) -> Tensor:
    """`x` with infinities replaced by 0: to subtract an infinite maximum would give NaN."""
    return torch.where(x.isinf(), torch.zeros_like(x), x)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """`torch.dot` of two `[N]`. RuntimeError, as torch's, for other shapes."""
    if x.dim() != 1 or x.shape != y.shape:
        raise RuntimeError(f"dot: two vectors of one size are needed, not {list(x.shape)} and {list(y.shape)}")
    return (x * y).sum()


def vdot(x: Tensor, y: Tensor) -> Tensor:
    """`torch.vdot` of two `[N]`. RuntimeError, as torch's, for other shapes."""
    return dot(x.conj(), y)


def trace(x: Tensor) -> Tensor:
    """`torch.trace` of `[M, N]`."""
    rows, columns = (torch.arange(n, device=x.device) for n in map(int, x.shape))
    on_diagonal = rows[:, None] == columns[None]
    return torch.where(on_diagonal, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum()


def _loss(of_errors: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean", **how: Any
    ) -> Tensor:
        weight = how.pop("weight", None)
        errors = of_errors(input - target, **how)
        errors = errors if weight is None else errors * weight
        asked = _reduction(size_average, reduce, reduction)
        return errors if asked == "none" else errors.sum() if asked == "sum" else errors.mean()

    return loss


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """What is asked for: by torch's two old options where one is given, as torch does. ValueError for another word."""
    if reduce is not None and not reduce:
        return "none"
    if size_average is not None or reduce is not None:
        return "mean" if size_average is None or size_average else "sum"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of 'none', 'mean', 'sum'")
    return reduction


def _huber(e: Tensor, delta: float = 1.0) -> Tensor:
    size = e.abs()
    return torch.where(size < delta, 0.5 * e * e, delta * (size - 0.5 * delta))


def _smooth(e: Tensor, beta: float = 1.0) -> Tensor:
    size = e.abs()
    return size if beta == 0 else torch.where(size < beta, 0.5 * e * e / beta, size - 0.5 * beta)


def huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, **how: Any) -> Tensor:
    """`F.huber_loss` of two tensors of one shape and dtype: 0-d, or of their shape with `reduction="none"`."""
    return _loss(_huber)(input, target, reduction=reduction, delta=delta, **how)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """`F.smooth_l1_loss` of two tensors of one shape and dtype: 0-d, or of their shape with `reduction="none"`."""
    return _loss(_smooth)(input, target, size_average, reduce, reduction, beta=beta)


REDUCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.var, Tensor.var), var), **dict.fromkeys((torch.std, Tensor.std), std),
    torch.var_mean: var_mean, torch.std_mean: std_mean,
    **dict.fromkeys((torch.count_nonzero, Tensor.count_nonzero), count_nonzero),
    **dict.fromkeys((torch.aminmax, Tensor.aminmax), aminmax),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp), logsumexp),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax), softmax),
    **dict.fromkeys((torch.log_softmax, Tensor.log_softmax, F.log_softmax), log_softmax),
    **dict.fromkeys((torch.dot, Tensor.dot), dot), **dict.fromkeys((torch.vdot, Tensor.vdot), vdot),
    **dict.fromkeys((torch.trace, Tensor.trace), trace),
    F.mse_loss: _loss(torch.square), F.l1_loss: _loss(torch.abs), F.huber_loss: huber_loss,
    F.smooth_l1_loss: smooth_l1_loss,
}  # fmt: skip
"""By torch's function, the function of this file that replaces it on pieces."""
