"""Attention from one run of a document's queries to another run of its keys: the off-diagonal part of a ring's work.

Within a document two runs that do not overlap see each other whole, or, with a window, in a band. Nothing is masked but
the band's edge, and keys the band does not reach are not read.

L queries, M keys, H query heads, G key/value heads, K head dim, V value dim.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import attention_math
from ftrain.kernels.attention_cpu import BLOCK, inner_dense, served_by_aten
from ftrain.kernels.attention_cuda import served_by_flash, whole_pack_offsets
from ftrain.kernels.dtypes import accumulate_dtype


class Band(NamedTuple):
    """Query `i` stands `offset` tokens after key `i` (negative: before), and sees the keys less than `window` tokens
    away. `scale`, `softcap`: as in `ftrain.kernels.attention.attention`.
    """

    offset: int
    window: int | None
    scale: float
    softcap: float | None = None

    def trimmed(self, L: int, M: int) -> "Band":
        """The band without a window that hides nothing of `L` queries and `M` keys."""
        farthest = max(abs(self.offset + L - 1), abs(self.offset - M + 1))
        return self._replace(window=None) if self.window is not None and farthest < self.window else self


class Tile(NamedTuple):
    """Queries `[i, i + L)` and the keys `[j, j + M)` that any of them sees."""

    i: int
    L: int
    j: int
    M: int


def forward(q_LHK: Tensor, k_MGK: Tensor, v_MGV: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Output `[L, H, V]` in the dtype of the queries and log-sum-exp `[H, L]` in the accumulation dtype.

    `band`: which keys a query sees; every query must see one, and the two runs must not overlap.
    """
    q_LHK, k_MGK, v_MGV = (inner_dense(x) for x in (q_LHK, k_MGK, v_MGV))
    L, M = q_LHK.shape[0], k_MGK.shape[0]
    band = band.trimmed(L, M)
    if _served_by_flash(q_LHK, v_MGV, band):
        out_LHV, lse_HL, *_ = torch.ops.aten._flash_attention_forward(
            q_LHK, k_MGK, v_MGV, *_offsets(q_LHK, L, M), L, M, 0.0, False, False, scale=band.scale, **_sides(band, L, M)
        )
        return out_LHV.contiguous(), lse_HL.contiguous()
    q, k, v = (_fold(x) for x in (q_LHK, k_MGK, v_MGV))
    out_1LHV = q.new_empty(1, L, q.shape[1], v.shape[3])
    lse_1HL = q.new_empty(1, q.shape[1], L)
    for tile in tiles(L, M, band, served_by_aten(q, v, band.softcap)):
        i, j = slice(tile.i, tile.i + tile.L), slice(tile.j, tile.j + tile.M)
        out, lse_1HL[:, :, i] = _tile_forward(q[:, :, i], k[:, :, j], v[:, :, j], band_mask(tile, band, q), band)
        out_1LHV[:, i] = out.transpose(1, 2)
    return out_1LHV[0].to(q_LHK.dtype), lse_1HL[0]


def backward(
    grad_LHV: Tensor,
    q_LHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    out_LHV: Tensor,
    lse_HL: Tensor,
    band: Band,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of queries, keys and values, of their shapes and dtypes.

    `out_LHV` and `lse_HL` are those of the queries over *all* their keys: the probabilities follow from them.
    """
    grad_LHV, q_LHK, k_MGK, v_MGV = (inner_dense(x) for x in (grad_LHV, q_LHK, k_MGK, v_MGV))
    L, M = q_LHK.shape[0], k_MGK.shape[0]
    band = band.trimmed(L, M)
    if _served_by_flash(q_LHK, v_MGV, band):
        return _flash_backward(grad_LHV, q_LHK, k_MGK, v_MGV, out_LHV, lse_HL, band)
    grad, q, k, v, out = (_fold(x) for x in (grad_LHV, q_LHK, k_MGK, v_MGV, out_LHV))
    lse = lse_HL[None].to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
    for tile in tiles(L, M, band, served_by_aten(q, v, band.softcap)):
        i, j = slice(tile.i, tile.i + tile.L), slice(tile.j, tile.j + tile.M)
        given = (grad[:, :, i], q[:, :, i], k[:, :, j], v[:, :, j], out[:, :, i], lse[:, :, i])
        dq[:, :, i], dk_j, dv_j = _tile_backward(*given, band_mask(tile, band, q), band)
        dk[:, :, j] += dk_j
        dv[:, :, j] += dv_j
    dq_LHK, dk_MGK, dv_MGV = (x[0].transpose(0, 1).to(q_LHK.dtype) for x in (dq, dk, dv))
    return dq_LHK, dk_MGK, dv_MGV


def tiles(L: int, M: int, band: Band, fused: bool) -> Iterator[Tile]:
    """Cut L queries and M keys so that little is computed that the band hides, and, where scores are stored, few at
    once.

    `fused`: whether a kernel computes a tile without storing its scores.
    """
    if band.window is None and fused:
        yield Tile(0, L, 0, M)
        return
    size = max(BLOCK, band.window or 0) if fused else BLOCK
    for i in range(0, L, size):
        last = min(L, i + size) - 1
        low, high = 0, M
        if band.window is not None:
            low = max(0, i + band.offset - band.window + 1)
            high = min(M, last + band.offset + band.window)
        yield Tile(i, last + 1 - i, low, high - low)


def band_mask(tile: Tile, band: Band, like: Tensor) -> Tensor | None:
    """What is added to the scores of a tile, `[L, M]`: 0 where seen, -inf elsewhere; None if everything is seen.

    `like`: a tensor of any shape with the mask's dtype and device.
    """
    window = band._replace(offset=band.offset + tile.i - tile.j).trimmed(tile.L, tile.M).window
    if window is None:
        return None
    i_L1 = torch.arange(tile.i, tile.i + tile.L, device=like.device)[:, None] + band.offset
    j_M = torch.arange(tile.j, tile.j + tile.M, device=like.device)
    hidden_LM = (i_L1 - j_M).abs_() >= window
    return torch.zeros(tile.L, tile.M, dtype=like.dtype, device=like.device).masked_fill_(hidden_LM, -torch.inf)


def _served_by_flash(q_LHK: Tensor, v_MGV: Tensor, band: Band) -> bool:
    """torch's own flash attention, which caps no scores."""
    return q_LHK.is_cuda and band.softcap is None and served_by_flash(q_LHK, v_MGV, None)


def _tile_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, band: Band) -> tuple[Tensor, Tensor]:
    if not served_by_aten(q, v, band.softcap):
        return attention_math.forward(q, k, v, False, mask, band.scale, band.softcap)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, False, attn_mask=mask, scale=band.scale)


def _tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, band: Band
) -> tuple[Tensor, Tensor, Tensor]:
    if not served_by_aten(q, v, band.softcap):
        return attention_math.backward(grad, q, k, v, out, lse, False, mask, band.scale, band.softcap)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=band.scale)


def _fold(x_LNK: Tensor) -> Tensor:
    """`[1, heads, L, K]` in the accumulation dtype: a view where it has it."""
    return x_LNK.transpose(0, 1)[None].to(accumulate_dtype(x_LNK.dtype))


def _offsets(q_LHK: Tensor, L: int, M: int) -> tuple[Tensor, Tensor]:
    """Cumulative lengths of one document."""
    return whole_pack_offsets(L, q_LHK.device), whole_pack_offsets(M, q_LHK.device)


def _sides(band: Band, L: int, M: int) -> dict[str, int]:
    """The window as flash attention counts it: keys before and after, with the last query standing at the last key."""
    if band.window is None:
        return {"window_size_left": -1, "window_size_right": -1}
    shift = band.offset - (M - L)
    if band.offset > 0:
        return {"window_size_left": band.window - 1 - shift, "window_size_right": -1}
    return {"window_size_left": -1, "window_size_right": band.window - 1 + shift}


def _flash_backward(
    grad_LHK: Tensor, q_LHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, out_LHK: Tensor, lse_HL: Tensor, band: Band
) -> tuple[Tensor, Tensor, Tensor]:
    L, M = q_LHK.shape[0], k_MGK.shape[0]
    # without dropout the state of the random numbers is never read
    rng_state = torch.empty(2, dtype=torch.uint64, device=q_LHK.device)
    unused = torch.empty(0, device=q_LHK.device)
    dq_LHK, dk_MGK, dv_MGK = torch.ops.aten._flash_attention_backward(
        grad_LHK,
        q_LHK,
        k_MGK,
        v_MGK,
        out_LHK.contiguous(),
        lse_HL.contiguous(),
        *_offsets(q_LHK, L, M),
        L,
        M,
        0.0,
        False,
        rng_state,
        unused,
        scale=band.scale,
        **_sides(band, L, M),
    )
    return dq_LHK, dk_MGK, dv_MGK
