"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864), along one axis of positions or several.

Legend: T tokens, H heads, K head dim, F frequencies (half of the rotated dims), A axes of positions (time, row, ...).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.chunks import PIECE
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.yarn import YarnScaling

# On CUDA the reference: Inductor fuses it with its neighbours, which an opaque op would prevent.
_BACKENDS = {"cpu": "cpu"}

_LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies for texts longer than those of pretraining, which had `original_length` tokens (Llama 3.1, arXiv
    2407.21783; `rope_scaling` of its Hugging Face configuration).

    - `factor`: what slow frequencies are divided by, at least 1.
    - `low_turns`, `high_turns`: frequencies that turn more than `high_turns` times over the original length stay, those
      that turn less than `low_turns` times are divided, and between them the division fades.
    - `original_length`: tokens.

    ValueError for a factor below 1, lengths or turns that are not positive, and `low_turns` not below `high_turns`.
    """

    factor: float
    low_turns: float
    high_turns: float
    original_length: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_turns < self.high_turns and self.original_length > 0):
            raise ValueError(
                f"{self}: factor must be at least 1, original_length positive, and low_turns less than high_turns"
            )

    def apply(self, ladder_F: Tensor) -> Tensor:
        """The scaled frequencies, `[F]`, in radians per token."""
        turns_F = ladder_F * (self.original_length / (2 * math.pi))
        kept_F = ((turns_F - self.low_turns) / (self.high_turns - self.low_turns)).clamp(0, 1)
        return ladder_F * (kept_F + (1 - kept_F) / self.factor)


def rope_table(
    positions: Tensor,
    *,
    head_dim: int,
    base: float = 10000.0,
    sections: tuple[int, ...] | None = None,
    interleaved: bool = False,
    per_axis_ladder: bool = False,
    scaling: Llama3Scaling | YarnScaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, F]` of the angles in `dtype`, F = head_dim / 2; computed in float64.

    - `positions`: `[T]`, or `[A, T]` with `sections`; any number dtype.
    - `head_dim`: K, even. Frequency j of n is `base ** (-j / n)` radians per position, then `scaling` is applied
      (that of YaRN enlarges the cosines and sines too).
    - `sections`: how many of the F frequencies turn with each axis; they sum to F.
    - Qwen2-VL (M-RoPE, arXiv 2409.12191): one ladder of F frequencies, cut into consecutive blocks, one per axis.
    - Qwen3-VL (`interleaved`): one ladder; of the first `A * sections[a]` frequencies axis a > 0 owns a, a + A, ...;
      axis 0 owns the rest.
    - ViT in two dims, Wan in three (`per_axis_ladder`): consecutive blocks, each a ladder of its own `sections[a]`
      frequencies that begins at 1.

    ValueError for an odd head dim, and for sections that do not fit the positions, F or each other.

    >>> import torch
    >>> from ftrain.kernels.rope import rope_table
    >>> cos_TF, sin_TF = rope_table(torch.arange(3), head_dim=4)
    >>> sin_TF
    tensor([[0.0000, 0.0000],
            [0.8415, 0.0100],
            [0.9093, 0.0200]])
    """
    if head_dim % 2 or head_dim <= 0:
        raise ValueError(f"rope_table: head_dim={head_dim} must be even and positive")
    frequencies = head_dim // 2
    position_AT = positions[None] if positions.dim() == 1 else positions
    _check_sections(position_AT, frequencies, sections, interleaved=interleaved, per_axis_ladder=per_axis_ladder)
    sections = sections or (frequencies,)
    position_AT = position_AT.double()
    if per_axis_ladder:
        ladders = [_ladder(n, base, scaling, positions.device) for n in sections]
        angle_TF = torch.cat([p[:, None] * f for p, f in zip(position_AT, ladders, strict=True)], dim=1)
    else:
        ladder_F = _ladder(frequencies, base, scaling, positions.device)
        angle_TF = _shared_ladder(position_AT, ladder_F, sections, interleaved)
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    if isinstance(scaling, YarnScaling):
        cos_TF, sin_TF = scaling.amplitude * cos_TF, scaling.amplitude * sin_TF
    return cos_TF.to(dtype), sin_TF.to(dtype)


def rope(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, layout: str = "half", backend: str = "auto") -> Tensor:
    """Rotate the first 2F dims of each head by its token's angles: `[T, H, K]` in the dtype of x; dims beyond 2F pass
    through.

    - `x_THK`: floating. `cos_TF`, `sin_TF`: of `rope_table`; 2F is at most K.
    - `layout`: frequency j turns the pair of dims `(j, j + F)` with "half" (Llama, Hugging Face) or `(2j, 2j + 1)` with
      "interleaved" (GPT-J, Wan).
    - `backend`: "auto", "reference" or "cpu".

    Computed in float32 (float64 for float64) and rounded once. Differentiable to any order in x; a derivative in the
    table is a NotImplementedError with "cpu". ValueError for shapes, dtypes, layouts and backends that do not fit.
    Source: Su et al., arXiv 2104.09864.

    >>> import torch
    >>> from ftrain.kernels.rope import rope, rope_table
    >>> cos_TF, sin_TF = rope_table(torch.arange(2), head_dim=2)
    >>> rope(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), cos_TF, sin_TF)
    tensor([[[1.0000, 0.0000]],
    <BLANKLINE>
            [[0.5403, 0.8415]]])
    """
    _check(x_THK, cos_TF, sin_TF, layout)
    if choose_backend(backend, x_THK.device, _BACKENDS) == "reference":
        return rope_reference(x_THK, cos_TF, sin_TF, layout=layout)
    return _Rope.apply(x_THK, cos_TF, sin_TF, layout, False)


def rope_reference(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, layout: str = "half") -> Tensor:
    """`rope` in plain torch: `[T, H, K]`, differentiable to any order, in the table too."""
    F = cos_TF.shape[-1]
    wide = accumulate_dtype(x_THK.dtype)
    cos_T1F, sin_T1F = cos_TF.to(wide)[:, None], sin_TF.to(wide)[:, None]
    turned, rest = x_THK[..., : 2 * F].to(wide), x_THK[..., 2 * F :]
    if layout == "half":
        a, b = turned[..., :F], turned[..., F:]
        y = torch.cat([a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F], dim=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack([a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F], dim=-1).flatten(-2)
    y = y.to(x_THK.dtype)
    return torch.cat([y, rest], dim=-1) if rest.shape[-1] else y


class _Rope(torch.autograd.Function):
    """Linear, and its transpose is the rotation by minus the angle: every derivative is one of these again."""

    @staticmethod
    def forward(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, layout: str, inverse: bool) -> Tensor:
        return _rotate(x_THK, cos_TF, sin_TF, layout, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, cos_TF, sin_TF, ctx.layout, ctx.inverse = inputs
        ctx.save_for_backward(cos_TF, sin_TF)

    @staticmethod
    def backward(ctx: Any, dy_THK: Tensor) -> Any:
        if any(ctx.needs_input_grad[1:3]):
            raise NotImplementedError("rope has no derivative in its table with this backend; pass backend='reference'")
        return _Rope.apply(dy_THK, *ctx.saved_tensors, ctx.layout, not ctx.inverse), None, None, None, None


def _ladder(n: int, base: float, scaling: Llama3Scaling | YarnScaling | None, device: torch.device) -> Tensor:
    exponent = torch.arange(n, dtype=torch.float64, device=device) / n
    ladder_F = torch.exp(exponent * -math.log(base))
    if isinstance(scaling, YarnScaling):
        return scaling.apply(ladder_F, base)
    return ladder_F if scaling is None else scaling.apply(ladder_F)


def _shared_ladder(position_AT: Tensor, ladder_F: Tensor, sections: tuple[int, ...], interleaved: bool) -> Tensor:
    """Angles `[T, F]` of one ladder whose frequencies are distributed over the axes."""
    axes = len(sections)
    if not interleaved:
        blocks_F = ladder_F.split(sections)
        return torch.cat([p[:, None] * f for p, f in zip(position_AT, blocks_F, strict=True)], dim=1)
    slot_F = torch.arange(len(ladder_F), device=ladder_F.device)
    owner_TF = position_AT[0][:, None]
    for axis in range(1, axes):
        mine_F = (slot_F % axes == axis) & (slot_F < axes * sections[axis])
        owner_TF = torch.where(mine_F, position_AT[axis][:, None], owner_TF)
    return owner_TF * ladder_F


def _check_sections(
    position_AT: Tensor,
    frequencies: int,
    sections: tuple[int, ...] | None,
    *,
    interleaved: bool,
    per_axis_ladder: bool,
) -> None:
    if position_AT.dim() != 2:
        raise ValueError(f"rope_table: positions must be [T] or [axes, T], got {list(position_AT.shape)}")
    axes = position_AT.shape[0]
    if sections is None:
        if axes != 1 or interleaved or per_axis_ladder:
            raise ValueError(f"rope_table: {axes} axes of positions need sections, frequencies per axis")
        return
    if len(sections) != axes or sum(sections) != frequencies or min(sections) < 0:
        raise ValueError(
            f"rope_table: sections {sections} must give each of {axes} axes its frequencies, {frequencies} in all "
            f"(half of head_dim), but sum to {sum(sections)}"
        )
    if interleaved and per_axis_ladder:
        raise ValueError(
            "rope_table: take one of interleaved (one ladder, dealt out) and per_axis_ladder (one for each axis)"
        )
    if interleaved and any(axis + axes * (n - 1) >= frequencies for axis, n in enumerate(sections) if axis and n):
        raise ValueError(f"rope_table: interleaved sections {sections} do not fit in {frequencies} frequencies")


def _check(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, layout: str) -> None:
    if layout not in _LAYOUTS:
        raise ValueError(f"rope: layout={layout!r} is not one of {list(_LAYOUTS)}")
    if x_THK.dim() != 3 or not x_THK.is_floating_point():
        raise ValueError(f"rope: x must be floating point [T, H, K], got {x_THK.dtype} {list(x_THK.shape)}")
    if cos_TF.shape != sin_TF.shape or cos_TF.dim() != 2 or cos_TF.shape[0] != x_THK.shape[0]:
        raise ValueError(
            f"rope: cos {list(cos_TF.shape)} and sin {list(sin_TF.shape)} must be [T, F] with T of x "
            f"{list(x_THK.shape)}"
        )
    if 2 * cos_TF.shape[1] > x_THK.shape[2]:
        raise ValueError(f"rope: {cos_TF.shape[1]} frequencies turn twice as many dims; x is {list(x_THK.shape)}")


def _rotate_cpu(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, layout: str, inverse: bool) -> Tensor:
    y_THK = torch.empty_like(x_THK, memory_format=torch.contiguous_format)
    if y_THK.numel() == 0:
        return y_THK
    F, wide = cos_TF.shape[1], accumulate_dtype(x_THK.dtype)
    turn = _turn_half if layout == "half" else _turn_interleaved
    y_THK[..., 2 * F :].copy_(x_THK[..., 2 * F :])
    for t in range(0, x_THK.shape[0], _tokens(x_THK)):
        here = slice(t, t + _tokens(x_THK))
        x, y = x_THK[here, :, : 2 * F], y_THK[here, :, : 2 * F]
        turn(x.to(wide), cos_TF[here, None].to(wide), sin_TF[here, None].to(wide), y, inverse)
    return y_THK


def _tokens(x_THK: Tensor) -> int:
    """Tokens in a piece."""
    return max(1, PIECE // max(1, x_THK.shape[1] * x_THK.shape[2]))


def _turn_half(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, inverse: bool) -> None:
    into = y if y.dtype == x.dtype else torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (into_a, into_b) = x.chunk(2, dim=-1), into.chunk(2, dim=-1)
    torch.mul(a, cos, out=into_a).addcmul_(b, sin, value=1 if inverse else -1)
    torch.mul(b, cos, out=into_b).addcmul_(a, sin, value=-1 if inverse else 1)
    if into is not y:
        y.copy_(into)


def _turn_interleaved(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, inverse: bool) -> None:
    """One complex product: vectorised, where steps of two elements are not."""
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(cos, -sin if inverse else sin)
    y.copy_(torch.view_as_real(turned).flatten(-2))


_rotate = opaque_op(
    "rope(Tensor x, Tensor cos, Tensor sin, str layout, bool inverse) -> Tensor",
    fake=lambda x, cos, sin, layout, inverse: x.new_empty(x.shape),
)(_rotate_cpu)


def _workspace(x: Tensor, cos: Tensor, sin: Tensor, layout: str, inverse: bool) -> int:
    """The piece in float32 and turned, and its angles."""
    wide, F = accumulate_dtype(x.dtype), cos.shape[1]
    tokens = min(x.shape[0], _tokens(x))
    in_place = x.dtype == wide and (layout == "half" or (x.is_contiguous() and x.shape[2] == 2 * F))
    copies = (0 if in_place else 1) + (0 if x.dtype == wide and layout == "half" else 1)
    tables = 2 * (cos.dtype != wide) + (0 if layout == "half" else 2)
    return tokens * F * wide.itemsize * (copies * x.shape[1] * 2 + tables)


WORKSPACE: dict[str, Callable[..., int]] = {"ftrain::rope": _workspace}
