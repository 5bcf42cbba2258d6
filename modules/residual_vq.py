"""Residual vector quantization: each level's codebook quantizes what those before it leave over (SoundStream, 2021).

Codebooks are moving averages of the rows that choose their entries (van den Oord et al. 2017, appendix A): a *state*,
which a step moves on (`moved`) and no gradient reaches. Or they are a parameter and learn by gradient: `quantize` takes
either, and its entries are differentiable in the codebooks, for the term `codebook`.

Legend: R rows, Z width, Q levels, K entries of a level.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.embedding import embedding
from ftrain.kernels.mean import Mean, mean_where, sum_over_batch
from ftrain.modules.spec import ParamSpec, Tree, fan_in, ones

LEAST = 1e-5
"""An entry that fewer rows have chosen, on average, is divided by this number."""


class Quantized(NamedTuple):
    """By level: codes int64 `[Q, R]`, the entries `[Q, R, Z]` that they name, and the rows `[Q, R, Z]` that these
    quantize: what the levels before leave over, differentiable in the rows alone.
    """

    codes_QR: Tensor
    entries_QRZ: Tensor
    left_QRZ: Tensor


def state_specs(levels: int, entries: int, width: int) -> dict[str, ParamSpec]:
    """Codebooks as a state: `embed_sum_QKZ`, the averaged sum of the rows of an entry, `cluster_usage_QK`, how many
    they were, and `initialized_Q1`, ones, which Mimi's files have.
    """
    axes = (None, "codebook", "code_dim")
    return {
        "cluster_usage_QK": ParamSpec((levels, entries), axes[:2], ones()),
        "embed_sum_QKZ": ParamSpec((levels, entries, width), axes, fan_in(width)),
        "initialized_Q1": ParamSpec((levels, 1), (None, None), ones()),
    }


def books(state: Tree) -> Tensor:
    """The codebooks `[Q, K, Z]` of a state.

    >>> state = {"embed_sum_QKZ": torch.full((1, 1, 2), 6.0), "cluster_usage_QK": torch.tensor([[2.0]])}
    >>> books(state).tolist()
    [[[3.0, 3.0]]]
    """
    found: Tensor = state["embed_sum_QKZ"] / state["cluster_usage_QK"].clamp(min=LEAST)[..., None]
    return found


def nearest(rows_RZ: Tensor, book_KZ: Tensor) -> Tensor:
    """The index of the closest entry for each row, `[R]` int64. No gradient.

    >>> nearest(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]])).tolist()
    [1, 0]
    """
    wide = accumulate_dtype(rows_RZ.dtype)
    rows_RZ, book_KZ = rows_RZ.detach().to(wide), book_KZ.detach().to(wide)
    # |r - b|^2 without |r|^2, which is the same for all entries
    return (book_KZ.square().sum(1) - 2 * rows_RZ @ book_KZ.T).argmin(1)


def quantize(rows_RZ: Tensor, books_QKZ: Tensor, *, levels: int | None = None) -> Quantized:
    """The rows by the first `levels` codebooks; None: by all.

    >>> books_QKZ = torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]])
    >>> found = quantize(torch.tensor([[4.8]]), books_QKZ)
    >>> found.codes_QR.tolist(), found.entries_QRZ.sum(0).tolist()
    ([[1], [1]], [[5.0]])
    """
    codes, entries, left, left_RZ = list[Tensor](), list[Tensor](), list[Tensor](), rows_RZ
    for book_KZ in books_QKZ[:levels].to(rows_RZ.dtype).unbind(0):
        codes.append(nearest(left_RZ, book_KZ))
        entries.append(embedding(codes[-1], book_KZ))
        left.append(left_RZ)
        left_RZ = left_RZ - entries[-1].detach()
    return Quantized(torch.stack(codes), torch.stack(entries), torch.stack(left))


def named(codes_QR: Tensor, books_QKZ: Tensor) -> Tensor:
    """The sums `[R, Z]` of the entries that codes `[Q, R]` name; the first Q codebooks are read."""
    levels = zip(codes_QR.unbind(0), books_QKZ.unbind(0), strict=False)
    return torch.stack([embedding(codes_R, book_KZ) for codes_R, book_KZ in levels]).sum(0)


def straight_through(rows_RZ: Tensor, found: Quantized) -> Tensor:
    """The quantized rows `[R, Z]`, whose gradient is that of the rows (Bengio et al. 2013)."""
    return rows_RZ + (found.entries_QRZ.sum(0) - rows_RZ).detach()


def commitment(found: Quantized, counted_R: Tensor) -> Mean:
    """How far rows are from the entries that they choose: the mean square over rows that count (bool `[R]`) and levels,
    differentiable in the rows.
    """
    return _mean(found.left_QRZ - found.entries_QRZ.detach(), counted_R)


def codebook(found: Quantized, counted_R: Tensor) -> Mean:
    """The same number, differentiable in the entries: for codebooks that learn by gradient."""
    return _mean(found.entries_QRZ - found.left_QRZ.detach(), counted_R)


def _mean(difference_QRZ: Tensor, counted_R: Tensor) -> Mean:
    square_QR = difference_QRZ.to(accumulate_dtype(difference_QRZ.dtype)).square().mean(-1)
    return mean_where(square_QR.flatten(), counted_R.expand_as(square_QR).flatten())


def moved(state: Tree, found: Quantized, counted_R: Tensor, *, decay: float = 0.99) -> Tree:
    """The state after a step, of the whole batch's rows that count (bool `[R]`), on every rank alike. No gradient.

    `decay`: what is kept of the averages, of each step's `1 - decay` is added.
    """
    usage_QK, sum_QKZ = state["cluster_usage_QK"], state["embed_sum_QKZ"]
    # A product with what was chosen, not a scatter: it is summed in a fixed order.
    entries_K = torch.arange(usage_QK.shape[1], device=usage_QK.device)
    chosen_QRK = (found.codes_QR[..., None] == entries_K) & counted_R[:, None]
    chosen_QRK = chosen_QRK.to(sum_QKZ.dtype)
    rows_QRZ = found.left_QRZ.detach().to(sum_QKZ.dtype)
    counts_QK, sums_QKZ = sum_over_batch(chosen_QRK.sum(1)), sum_over_batch(chosen_QRK.mT @ rows_QRZ)
    return {
        **state,
        "cluster_usage_QK": usage_QK * decay + counts_QK * (1 - decay),
        "embed_sum_QKZ": sum_QKZ * decay + sums_QKZ * (1 - decay),
    }


def revived(state: Tree, rows_QRZ: Tensor, *, key: Tensor, least: float = 0.1) -> Tree:
    """The state with every entry used less than `least` times on average set upon a row of its level, drawn by the key
    (int64 `[2]`), as if one row had chosen it.

    A pure function for between steps, with rows that were quantized (`Quantized.left_QRZ`): Dhariwal et al. 2020.
    """
    usage_QK, sum_QKZ = state["cluster_usage_QK"], state["embed_sum_QKZ"]
    drawn_QK = random.randint(key, tuple(usage_QK.shape), low=0, high=rows_QRZ.shape[1])
    seats_QKZ = rows_QRZ.gather(1, drawn_QK[..., None].expand(-1, -1, rows_QRZ.shape[2])).to(sum_QKZ.dtype)
    dead_QK = usage_QK < least
    return {
        **state,
        "cluster_usage_QK": torch.where(dead_QK, 1, usage_QK),
        "embed_sum_QKZ": torch.where(dead_QK[..., None], seats_QKZ, sum_QKZ),
    }
