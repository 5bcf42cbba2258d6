"""One AdamW update of one leaf, in a single pass over memory (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter,
arXiv 1711.05101).

Plain torch reads and writes each tensor of a leaf many times; torch's fused kernel once, but it overwrites its
arguments. Here it runs on a piece of a leaf at a time, with a scratch piece that stays in cache, so the result is an
*update* and the arguments stay as they are, at nearly the same speed. The twin `adamw_in_place` is the same loop that
writes what it finds over parameter and averages: equal to the bit, for a graph that owns their memory.

All tensors of a leaf have one shape. p parameter, g gradient, m average of gradients, v average of squares.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.opaque import opaque_op

PIECE = 1 << 17
"""Elements computed together: half a MiB of float32."""

SMALLEST_RATE = 1e-30  # so small that no parameter moves, and its inverse is a float32

_BACKENDS = {"cpu": "fused"}  # elsewhere compilers fuse the plain form


class Scalars(NamedTuple):
    """What the leaves of one update share, all 0-d.

    - `steps`: int64, how many updates were made, this one included.
    - `rate`: float64, the learning rate.
    - `scale`, `offset`: for the plain form, in the dtype of the arithmetic: the step is `m / (offset + scale *
      sqrt(v))`.
    """

    steps: Tensor
    rate: Tensor
    scale: Tensor
    offset: Tensor


def scalars(steps: Tensor, rate: float | Tensor, *, b1: float, b2: float, eps: float, dtype: torch.dtype) -> Scalars:
    """The `Scalars` of an update: rate, sign and bias corrections folded into two numbers.

    - `steps`: int64 0-d, how many updates were made, this one included.
    - `rate`: the learning rate, a float or a 0-d tensor. 0 becomes 1e-30, since it is divided by.
    - `b1`, `b2`, `eps`: as in `adamw_update`. `dtype`: of `scale` and `offset`.

    The arithmetic is float64: in float32 `1 - b2^steps` loses four digits at step 1.
    """
    exact = steps.to(torch.float64)
    if isinstance(rate, Tensor):
        rate = rate.to(torch.float64)
    else:
        rate = torch.full((), rate, dtype=torch.float64, device=steps.device)
    first, second = 1 - torch.pow(b1, exact), 1 - torch.pow(b2, exact)
    factor = first / -rate.clamp(min=SMALLEST_RATE)
    return Scalars(steps, rate, (factor / second.sqrt()).to(dtype), (factor * eps).to(dtype))


def adamw_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    at: Scalars,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`(update, m, v)` with `p + update = p - rate * (m / (sqrt(v) + eps) + weight_decay * p)`, m and v without bias.

    - `p`, `g`, `m`, `v`: parameter, gradient, and averages of gradients and of squares, all of one shape. The
      arithmetic and the update have the dtype of `v` (float32 or float64 for "fused"); m keeps its own.
    - `at`: the `scalars` of this update, made with the same `b1`, `b2` and `eps`.
    - `b1`, `b2`: decay of m and of v. `weight_decay`: decoupled from the gradient, 0 for none.
    - `backend`: "auto", "reference" or "fused" (CPU). "fused" is not differentiable: "auto" takes the plain form where
      an argument requires a gradient, and off the CPU. ValueError for another name.

    Source: Loshchilov and Hutter, arXiv 1711.05101; equal to `torch.optim.AdamW`.

    >>> import torch
    >>> from ftrain.kernels.adamw import adamw_update, scalars
    >>> p, g, zero = torch.ones(2), torch.tensor([0.5, -3.0]), torch.zeros(2)
    >>> at = scalars(torch.tensor(1), 0.1, b1=0.9, b2=0.999, eps=1e-8, dtype=torch.float32)
    >>> update, m, v = adamw_update(p, g, zero, zero, at, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    >>> update
    tensor([-0.1000,  0.1000])
    """
    fits = v.dtype in (torch.float32, torch.float64) and p.is_floating_point()
    frozen = not torch.is_grad_enabled() or not any(x.requires_grad for x in (p, g, m, v, at.rate))
    chosen = choose_backend(backend, p.device, _BACKENDS if fits and frozen else {})
    if chosen == "reference":
        return adamw_reference(p, g, m, v, at, b1=b1, b2=b2, weight_decay=weight_decay)
    return adamw_fused(p, g, m, v, at.steps, at.rate, b1, b2, eps, weight_decay)


def adamw_reference(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, at: Scalars, *, b1: float, b2: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `adamw_update`, in plain torch, with its arguments: `(update, m, v)`, all of the shape of
    `p`.
    """
    g, p = g.to(v.dtype), p.to(v.dtype)
    m_new = torch.lerp(m.to(v.dtype), g, 1 - b1)
    v_new = torch.addcmul(v * b2, g, g, value=1 - b2)
    denominator = torch.addcmul(at.offset, v_new.sqrt(), at.scale)
    if weight_decay:
        # decayed and stepped as torch does and then told as a difference: its rounding of p * keep adds up
        update = torch.addcdiv(p * (1 - at.rate * weight_decay).to(v.dtype), m_new, denominator) - p
    else:
        update = m_new / denominator
    return update, m_new.to(m.dtype), v_new


@opaque_op(
    "adamw_fused(Tensor p, Tensor g, Tensor m, Tensor v, Tensor steps, Tensor rate, float b1, float b2, float eps, "
    "float weight_decay) -> (Tensor, Tensor, Tensor)",
    fake=lambda p, g, m, v, *_: (v.new_empty(v.shape), m.new_empty(m.shape), v.new_empty(v.shape)),
)
def adamw_fused(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    steps: Tensor,
    rate: Tensor,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(update, m, v)` of `adamw_update` as one op, piece by piece.

    `p`, `g`, `m`, `v`: one shape. `steps`, `rate`: 0-d, of `Scalars`. The numbers are those of `adamw_update`.
    """
    update, m_new, v_new = v.new_empty(v.shape), m.new_empty(m.shape), v.new_empty(v.shape)
    step = _Step(steps.to(torch.float32), float(rate), b1, b2, eps, weight_decay)
    for u_n, p_n, g_n, m_n, v_n, to_m_n, to_v_n in _pieces(update, p, g, m, v, m_new, v_new):
        to_v_n.copy_(v_n)
        wide_m_n = to_m_n.copy_(m_n) if m.dtype == v.dtype else m_n.to(v.dtype)
        _take(step, u_n, p_n, g_n, wide_m_n, to_v_n)
        if m.dtype != v.dtype:
            to_m_n.copy_(wide_m_n)
    return update, m_new, v_new


@opaque_op(
    "adamw_in_place(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor steps, Tensor rate, float b1, float b2, "
    "float eps, float weight_decay, Tensor? keep=None) -> ()",
    fake=lambda *_: None,
)
def adamw_in_place(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    steps: Tensor,
    rate: Tensor,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    keep: Tensor | None = None,
) -> None:
    """`p += update` and the new averages over the old ones: `adamw_update`, to the bit, that overwrites its arguments.

    `p`, `g`, `m`, `v`: one shape; `p`, `m` and `v` contiguous and of one dtype. `steps`, `rate`: 0-d, of `Scalars`. The
    numbers are those of `adamw_update`. Nothing happens where `keep`, a 0-d bool, is false.
    """
    if keep is not None and not keep:
        return
    step = _Step(steps.to(torch.float32), float(rate), b1, b2, eps, weight_decay)
    scratch = v.new_empty(min(PIECE, v.numel()))
    for p_n, g_n, m_n, v_n in _pieces(p, g, m, v):
        u_n = scratch[: p_n.numel()]
        _take(step, u_n, p_n, g_n, m_n, v_n)
        p_n.add_(u_n)


class _Step(NamedTuple):
    """The numbers of one update, ready for the kernel."""

    steps: Tensor
    rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float


def _take(step: _Step, u_n: Tensor, p_n: Tensor, g_n: Tensor, m_n: Tensor, v_n: Tensor) -> None:
    """Write the update of a piece into `u_n` and its averages over `m_n`, `v_n`."""
    u_n.copy_(p_n)
    torch._fused_adamw_(
        [u_n],
        [g_n.to(v_n.dtype)],
        [m_n],
        [v_n],
        [],
        [step.steps],
        lr=step.rate,
        beta1=step.b1,
        beta2=step.b2,
        weight_decay=step.weight_decay,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
    )
    u_n.sub_(p_n)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of one shape, flat."""
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), PIECE):
        yield tuple(t[start : start + PIECE] for t in flat)


def _strided_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_contiguous())


def _workspace(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *_: object) -> int:
    """Pieces converted to the dtype of the arithmetic, and whole copies of strided tensors."""
    piece = min(PIECE, v.numel()) * v.element_size()
    return piece * sum(x.dtype != v.dtype for x in (g, m)) + _strided_bytes(p, g, m, v)


def _in_place_workspace(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *_: object) -> int:
    return min(PIECE, v.numel()) * v.element_size() + _workspace(p, g, m, v)


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::adamw_fused": _workspace,
    "ftrain::adamw_in_place": _in_place_workspace,
}
"""Op name to peak bytes beyond the op's outputs, from its arguments."""
