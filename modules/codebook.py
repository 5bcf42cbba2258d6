"""Vector quantization (VQ-VAE, van den Oord et al. 2017): rows become the nearest entries of a codebook.

With several levels each quantizes what those before it leave over (SoundStream, Zeghidour et al. 2021; RQ-VAE, Lee et
al. 2022). Entries are differentiable in the codebooks, which learn by gradient or are averages
(modules/codebook_averages.py); entries that nothing uses are seated anew (`revive`).

Tokenizers number codes: level q's are q * K and on, and those of an item come level by level, coarse to fine.

Legend: R rows, Z width, Q levels, K entries of a level; B items, N codes of an item.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.embedding import embedding
from ftrain.kernels.mean import Mean, mean_where
from ftrain.modules.spec import Normal, ParamSpec


class Quantized(NamedTuple):
    """By level: codes int64 `[Q, R]`, each below K, the entries `[Q, R, Z]` that they name, and the rows `[Q, R, Z]`
    that these quantize: what the levels before leave over, differentiable in the rows alone.
    """

    codes_QR: Tensor
    entries_QRZ: Tensor
    left_QRZ: Tensor


def specs(levels: int, entries: int, width: int) -> ParamSpec:
    """The codebooks of all levels as a parameter, `[Q, K, Z]`."""
    return ParamSpec((levels, entries, width), (None, "codebook", "code_dim"), Normal(width**-0.5))


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


def pull(found: Quantized, counted_R: Tensor) -> Mean:
    """The same number, differentiable in the entries: for codebooks that learn by gradient."""
    return _mean(found.entries_QRZ - found.left_QRZ.detach(), counted_R)


def _mean(difference_QRZ: Tensor, counted_R: Tensor) -> Mean:
    square_QR = difference_QRZ.to(accumulate_dtype(difference_QRZ.dtype)).square().mean(-1)
    return mean_where(square_QR.flatten(), counted_R.expand_as(square_QR).flatten())


def item_terms(found: Quantized, items: int) -> dict[str, Mean]:
    """`codebook` and `commitment` of items whose rows all count: `pull` and `commitment` as means over items, averaged
    over an item's numbers and summed over levels.
    """
    return {
        "codebook": per_item(found.entries_QRZ - found.left_QRZ.detach(), items, levels=len(found.codes_QR)),
        "commitment": per_item(found.left_QRZ - found.entries_QRZ.detach(), items, levels=len(found.codes_QR)),
    }


def per_item(difference: Tensor, items: int, *, levels: int = 1) -> Mean:
    """The mean square within an item (any shape), summed over items and levels, with the number of items."""
    total = difference.square().sum() * (items * levels / max(difference.numel(), 1))
    return Mean(total, torch.full((), items, dtype=torch.float32, device=difference.device))


def numbered(codes_QR: Tensor, places: int, entries: int) -> Tensor:
    """Codes of items of so many `places`, as tokenizers number them: `[B, N]`.

    >>> numbered(torch.tensor([[0, 1, 2], [2, 1, 0]]), 3, 10).tolist()
    [[0, 1, 2, 12, 11, 10]]
    """
    first_Q1 = torch.arange(len(codes_QR), device=codes_QR.device)[:, None] * entries
    return (codes_QR + first_Q1).unflatten(1, (-1, places)).transpose(0, 1).flatten(1)


def rows_of(codes_BN: Tensor, books_QKZ: Tensor) -> Tensor:
    """What numbered codes `[B, N]` of all levels add up to at each place of the items, `[R, Z]`.

    At a place of level q only q's entries stand; a code of another level is read as the entry of the same number.
    ValueError on a CPU for a code that is of no level.
    """
    levels, entries = books_QKZ.shape[:2]
    level_BN = (codes_BN // entries).clamp(0, levels - 1)  # what is of none stays beyond the entries, for `named`
    codes_QR = (codes_BN - level_BN * entries).unflatten(1, (levels, -1)).transpose(0, 1).flatten(1)
    return named(codes_QR, books_QKZ)


def usage(codes: Tensor, *, levels: int, entries: int) -> Tensor:
    """How often each entry of each level is used by numbered codes of any shape, `[Q, K]` float32."""
    ones = torch.ones(codes.numel(), device=codes.device)
    return torch.zeros(levels * entries, device=codes.device).index_add(0, codes.flatten(), ones).view(levels, -1)


def perplexity(usage_QK: Tensor) -> Tensor:
    """How many entries are used, in effect: e to the entropy of their shares, of each level, `[Q]`.

    >>> perplexity(torch.tensor([[3.0, 3.0, 0.0], [1.0, 0.0, 0.0]])).tolist()
    [2.0, 1.0]
    """
    share_QK = usage_QK / usage_QK.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(share_QK).sum(1).exp()


def drawn_seats(rows_QRZ: Tensor, entries: int, *, key: Tensor) -> Tensor:
    """A row of its level for each entry, `[Q, K, Z]`, drawn by the key (int64 `[2]`)."""
    levels, rows, width = rows_QRZ.shape
    drawn_QK = random.randint(key, (levels, entries), low=0, high=rows)
    return rows_QRZ.gather(1, drawn_QK[..., None].expand(-1, -1, width))


def revive(books_QKZ: Tensor, usage_QK: Tensor, rows_QRZ: Tensor, *, key: Tensor, least: float = 1.0) -> Tensor:
    """The codebooks with every entry used less than `least` times re-seated on a row drawn from its level's rows.

    A pure function, to be called now and then between steps with the usage since the last call (Dhariwal et al. 2020,
    Jukebox, "random restarts"). `key`: a random key, int64 `[2]`.
    """
    seats_QKZ = drawn_seats(rows_QRZ, books_QKZ.shape[1], key=key).to(books_QKZ.dtype)
    return torch.where((usage_QK < least)[..., None], seats_QKZ, books_QKZ)
