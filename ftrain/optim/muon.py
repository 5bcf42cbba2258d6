"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Shapes: w_EIO weights of a linear map from I to O, stored `[in, out]` after any leading dims, which are a batch: every
expert of `[E, I, O]` is a matrix of its own. torch and the papers store `[out, in]`; the factor on the learning rate
below counts out over in, as theirs does, so a transposed weight gets the transposed update.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels.backend import device_type
from ftrain.optim.norms import present
from ftrain.optim.shards import each_matrix, whole_shape
from ftrain.optim.transform import (
    LearningRate,
    Mask,
    Transform,
    cast,
    decays,
    new_count,
    rate_at,
    require_like,
    require_range,
    require_rate,
    warn_of_rounding,
    zeros,
)
from ftrain.tree import Tree

Adjust = Literal["original", "match_rms_adamw"]
_SMALL = 1 << 18  # elements that are orthogonalised together: their stack and its products are memory, too
QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; singular values end in about [0.7, 1.2], not at 1


class MuonState(NamedTuple):
    """`steps`: 0-d int64, updates made so far; `momentum`: the running average of gradients, shaped as the
    parameters.
    """

    steps: Tensor
    momentum: Tree


def muon(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = QUINTIC,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    eps: float = 1e-7,
    adjust: Adjust = "original",
    mask: Mask = None,
) -> Transform:
    """Muon: momentum whose matrices are orthogonalised. For leaves `[..., I, O]` only.

    `m <- momentum m + (1 - momentum) g`, `p <- p - rate * (factor * orthogonal(m) + weight_decay * p)`.

    - `learning_rate`: a number >= 0, a 0-d floating tensor or a schedule.
    - `momentum`: in [0, 1). `nesterov`: orthogonalise `momentum m + (1 - momentum) g` instead of m.
    - `weight_decay`: >= 0. `mask`: which leaves decay, a tree of bools or a function from parameters to one; None: all.
    - `ns_steps`, `ns_coefficients`, `eps`: of the Newton-Schulz iteration (see `orthogonalize`).
    - `ns_dtype`: its dtype; None is bfloat16 on CUDA and float32 elsewhere, in which CPUs without units for bfloat16
      are faster.
    - `adjust`: the factor. "original" is sqrt(max(1, out/in)); "match_rms_adamw" is 0.2 sqrt(max(in, out)), with which
      AdamW's rate and decay can be kept (Liu et al., arXiv 2502.16982).

    Equal to `torch.optim.Muon`, weights transposed. On a mesh the ranks that hold pieces or copies of a leaf divide its
    matrices, and those of leaves of its shape, among them: each is orthogonalised once. A step has one size whatever
    the gradient's is, so a leaf whose gradient is all zeros (the loss did not use it) stands still, momentum and decay
    included, as torch leaves out a parameter without a gradient.

    ValueError for values out of range, at `init` for a leaf that is no matrix (give it to another transform with
    `multi_transform`), and at an update for gradients that do not have the parameters' structure and shapes. Source:
    Jordan et al., 2024, kellerjordan.github.io/posts/muon.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.muon(0.1, weight_decay=0.0, ns_dtype=torch.float32)
    >>> params = {"w_IO": torch.zeros(2, 2)}
    >>> updates, state = tx.update({"w_IO": torch.eye(2)}, tx.init(params), params)
    >>> bool((updates["w_IO"].diagonal() < -0.06).all())
    True
    """
    require_rate(learning_rate)
    require_range("momentum", momentum, 0.0, 1.0)
    require_range("weight_decay", weight_decay, 0.0)
    require_range("eps", eps, 0.0)
    require_range("ns_steps", ns_steps, 1, 100)
    if adjust not in ("original", "match_rms_adamw"):
        raise ValueError(f"adjust must be 'original' or 'match_rms_adamw', not {adjust!r}")

    def init(params: Tree) -> MuonState:
        warn_of_rounding(params, "muon")
        tree.map_with_path(_require_matrix, params)
        return MuonState(new_count(params), zeros(params))

    def update(grads: Tree, state: MuonState, params: Tree) -> tuple[Tree, MuonState]:
        require_like(grads, params)
        rate = rate_at(learning_rate, state.steps)
        keep = 1 - rate * weight_decay

        def average(p: Tensor, g: Tensor, m: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
            g = cast(g, m.dtype)
            m = torch.where(here, torch.lerp(m, g, 1 - momentum), m)
            return m, torch.lerp(g, m, momentum) if nesterov else m

        def step(p: Tensor, o: Tensor, m: Tensor, decay: bool, here: Tensor) -> Tensor:
            step = cast(o, m.dtype) * (-_factor(whole_shape(p), adjust) * rate)
            if decay and weight_decay:
                # decayed and stepped as torch does and then told as a difference: its rounding of p * keep adds up
                p = cast(p, m.dtype)
                step = p * keep + step - p
            return torch.where(here, step, 0)

        used = present(grads)
        buffer, directions = tree.map_many(average, 2, params, grads, state.momentum, used)
        pieces, structure = tree.flatten(directions)
        dtype = _dtype_for(pieces) if ns_dtype is None else ns_dtype
        work = partial(orthogonalize_all, steps=ns_steps, coefficients=ns_coefficients, dtype=dtype, eps=eps)
        found = each_matrix(work, pieces, tree.leaves(params), dtype=dtype, together=_SMALL)
        updates = tree.map(step, params, tree.unflatten(structure, found), buffer, decays(mask, params), used)
        return updates, MuonState(state.steps + 1, buffer)

    return Transform(init, update)


def orthogonalize_all(gs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """`orthogonalize` of each tensor `[..., I, O]`, in order; small ones of one shape go together, since their ops cost
    more than their numbers. `options`: those of `orthogonalize`.
    """
    together: dict[Any, list[int]] = {}
    for i, g in enumerate(gs):
        together.setdefault((g.shape, g.dtype, g.device), []).append(i)
    found: dict[int, Tensor] = {}
    for (shape, *_), members in together.items():
        count = max(1, _SMALL // shape.numel())
        for some in (members[i : i + count] for i in range(0, len(members), count)):
            if len(some) == 1:
                found[some[0]] = orthogonalize(gs[some[0]], **options)
            else:
                found.update(zip(some, orthogonalize(torch.stack([gs[i] for i in some]), **options), strict=True))
    return [found[i] for i in range(len(gs))]


def orthogonalize(
    g_EIO: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> Tensor:
    """Near `U V^T` of each matrix `U S V^T`: same shape, in `dtype`, singular values in about [0.7, 1.2].

    Newton-Schulz: `x <- a x + (b y + c y^2) x`, `y = x x^T`, from x of Frobenius norm 1, on the side where y is small.

    - `g_EIO`: any leading dims.
    - `steps`: iterations. `coefficients`: a, b, c. `eps`: the smallest norm that is divided by.

    Source: Jordan et al., 2024, kellerjordan.github.io/posts/muon.

    >>> import torch
    >>> from ftrain import optim
    >>> x = optim.orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), dtype=torch.float32)
    >>> bool((torch.linalg.svdvals(x) - 1).abs().max() < 0.35)
    True
    """
    a, b, c = coefficients
    # laid out in memory as torch's weights are: matrix products then round as theirs do
    x = g_EIO.mT.to(dtype, memory_format=torch.contiguous_format)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        y = x @ x.mT
        x = _add_product(x, _add_product(y, y, y, beta=b, alpha=c), x, beta=a, alpha=1.0)
    return x if tall else x.mT


def _add_product(base: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """`beta * base + alpha * left @ right`, rounded once."""
    if base.ndim == 2:
        return torch.addmm(base, left, right, beta=beta, alpha=alpha)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (base, left, right)]
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).reshape(base.shape)


def _dtype_for(pieces: Sequence[Tensor]) -> torch.dtype:
    on_cuda = any(device_type(piece) == "cuda" for piece in pieces)
    return torch.bfloat16 if on_cuda else torch.float32


def _factor(shape: tuple[int, ...], adjust: Adjust) -> float:
    fan_in, fan_out = shape[-2:]
    if adjust == "original":
        return math.sqrt(max(1.0, fan_out / fan_in))
    return 0.2 * math.sqrt(max(fan_in, fan_out))


def _require_matrix(path: str, p: Tensor) -> None:
    if p.ndim < 2 or p.numel() == 0:
        raise ValueError(
            f"muon is for matrices: {path!r} has shape {list(p.shape)}; give it to adamw with multi_transform"
        )
