"""Normalizations over the batch where ranks divide it: statistics of the rows of all.

Legend: B rows, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.kernels.mean import sum_over_batch
from ftrain.trace.spmd import current_sharded


class WholeBatch(TorchFunctionMode):
    """Within the block `batch_norm` normalizes, on a mesh, by the rows of the whole batch, as one device would."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        trace = current_sharded()
        if func is torch.nn.functional.batch_norm and trace is not None and trace.plan.mesh.size > 1:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, `[B, C, ...]`, of the rows of all ranks; the running statistics are written."""
    if not training:
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = [0, *range(2, input.dim())]
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    count = sum_over_batch(torch.full((), input.numel() // input.shape[1], dtype=wide.dtype, device=input.device))
    mean_C = sum_over_batch(wide.sum(dims)) / count
    centered = wide - _channels(mean_C, input)
    variance_C = sum_over_batch(centered.square().sum(dims)) / count
    _write(running_mean, mean_C, momentum)
    _write(running_var, variance_C * (count / (count - 1)), momentum)
    found = centered * _channels((variance_C + eps).rsqrt(), input)
    found = found if weight is None else found * _channels(weight, input)
    found = found if bias is None else found + _channels(bias, input)
    return found.to(input.dtype)


def _channels(x_C: Tensor, like: Tensor) -> Tensor:
    """`[C]` beside `[B, C, ...]`."""
    return x_C.view(1, -1, *(1,) * (like.dim() - 2))


def _write(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        with torch.no_grad():
            running.mul_(1 - momentum).add_(new.detach().to(running.dtype) * momentum)
