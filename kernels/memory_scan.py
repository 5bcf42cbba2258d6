"""A memory that each step scales, corrects by a product of low rank, and adds to: what chunks of tokens hand on.

`S_n = kept_n S_(n-1) - left_n^T (right_n S_(n-1)) + added_n`, with `S_(-1) = 0`. One op however many steps there are;
its gradient is the same scan, backwards, with left and right exchanged.

Legend: B rows, H heads, N steps, C rows of a product (tokens of a chunk), K key dim, V value dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.opaque import opaque_op

_BACKENDS = {"cpu": "loop", "cuda": "loop"}


def memory_scan(
    kept_BHN: Tensor, left_BHNCK: Tensor, right_BHNCK: Tensor, added_BHNKV: Tensor, *, backend: str = "auto"
) -> Tensor:
    """The memory behind each step, `[B, H, N, K, V]`. The first step's `kept`, `left` and `right` meet an empty memory.

    - all of one floating dtype, in which it is computed: float32 or float64.
    - `backend`: "auto", "reference" or "loop", an op of its own; ValueError for another.

    Differentiable to any order. ValueError for shapes or dtypes that do not fit.

    >>> import torch
    >>> from ftrain.kernels.memory_scan import memory_scan
    >>> kept, zeros, ones = torch.full((1, 1, 3), 0.5), torch.zeros(1, 1, 3, 1, 1), torch.ones(1, 1, 3, 1, 1)
    >>> memory_scan(kept, zeros, zeros, ones).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    given = (kept_BHN, left_BHNCK, right_BHNCK, added_BHNKV)
    steps, dtypes = {x.shape[:3] for x in given}, {x.dtype for x in given}
    fits = left_BHNCK.shape == right_BHNCK.shape and left_BHNCK.shape[-1] == added_BHNKV.shape[-2]
    if len(steps) > 1 or len(dtypes) > 1 or not fits:
        raise ValueError(f"memory_scan: {', '.join(f'{x.dtype} {list(x.shape)}' for x in given)} do not fit")
    if choose_backend(backend, kept_BHN.device, _BACKENDS) == "reference":
        return memory_scan_reference(*given)
    return _Scan.apply(*given)


def memory_scan_reference(kept_BHN: Tensor, left_BHNCK: Tensor, right_BHNCK: Tensor, added_BHNKV: Tensor) -> Tensor:
    """`memory_scan` in plain torch, step by step: `[B, H, N, K, V]`, differentiable to any order."""
    states, state = list[Tensor](), torch.zeros_like(added_BHNKV[:, :, 0])
    for n in range(added_BHNKV.shape[2]):
        change_BHCV = right_BHNCK[:, :, n] @ state
        state = kept_BHN[:, :, n, None, None] * state - left_BHNCK[:, :, n].mT @ change_BHCV + added_BHNKV[:, :, n]
        states.append(state)
    return torch.stack(states, 2)


def before(state_BHNKV: Tensor) -> Tensor:
    """What each step meets, `[B, H, N, K, V]`: the memory behind the step before it; of the first, zeros."""
    return torch.cat([torch.zeros_like(state_BHNKV[:, :, :1]), state_BHNKV[:, :, :-1]], 2)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(kept: Tensor, left: Tensor, right: Tensor, added: Tensor) -> Tensor:
        return _scan(kept, left, right, added)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], output)

    @staticmethod
    def backward(ctx: Any, grad_BHNKV: Tensor) -> Any:
        kept, left, right, state = ctx.saved_tensors
        # from the last step on; each is given on by the step behind it, and the last one by none
        back = (x.flip(2).roll(1, 2) for x in (kept, right, left))
        grad_BHNKV = _Scan.apply(*back, grad_BHNKV.flip(2)).flip(2)
        met = before(state)
        dleft, dright = (right @ met) @ grad_BHNKV.mT, (left @ grad_BHNKV) @ met.mT
        return (grad_BHNKV * met).sum((-2, -1)), -dleft, -dright, grad_BHNKV


def _loop(kept: Tensor, left: Tensor, right: Tensor, added: Tensor) -> Tensor:
    rows = [x.flatten(0, 1) for x in (kept, left, right, added)]
    kept_RN, left_RNCK, right_RNCK, added_RNKV = rows
    out_RNKV = torch.empty_like(added_RNKV, memory_format=torch.contiguous_format)
    out_RNKV[:, :1] = added_RNKV[:, :1]
    for n in range(1, added_RNKV.shape[1]):
        given = (kept_RN[:, n, None, None], left_RNCK[:, n], right_RNCK[:, n], added_RNKV[:, n])
        _step(*given, out_RNKV[:, n - 1], out=out_RNKV[:, n])
    return out_RNKV.view(added.shape)


def _step(
    kept_R11: Tensor, left_RCK: Tensor, right_RCK: Tensor, added_RKV: Tensor, state_RKV: Tensor, *, out: Tensor
) -> None:
    """A function of its own, so that nothing of a step outlives it."""
    change_RCV = torch.bmm(right_RCK, state_RKV)
    new_RKV = torch.baddbmm(added_RKV, left_RCK.mT, change_RCV, alpha=-1)
    torch.addcmul(new_RKV, state_RKV, kept_R11, out=out)


_scan = opaque_op(
    "memory_scan(Tensor kept, Tensor left, Tensor right, Tensor added) -> Tensor",
    fake=lambda kept, left, right, added: added.new_empty(added.shape),
)(_loop)


def _workspace(kept: Tensor, left: Tensor, right: Tensor, added: Tensor) -> int:
    """A step's product and the memory before it is scaled."""
    rows = left.shape[0] * left.shape[1]
    return rows * (left.shape[3] + added.shape[3]) * added.shape[4] * added.element_size()


WORKSPACE: dict[str, Callable[..., int]] = {"ftrain::memory_scan": _workspace}
FLOPS: dict[str, Callable[..., int]] = {
    "ftrain::memory_scan": lambda kept, left, right, added: 4 * left.numel() * added.shape[4]
}
