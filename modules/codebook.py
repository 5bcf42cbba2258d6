"""Vector quantization (VQ-VAE, van den Oord et al. 2017): the nearest entries of a codebook, and how codebooks learn.

With several levels each quantizes what those before it leave over (RQ-VAE, Lee et al. 2022). A codebook learns by
gradient, or follows the averages of the rows that chose each entry (`Averages`); entries that nothing uses are seated
anew (`revive`).

Legend: R rows to be quantized, Q levels, K entries of a level's codebook, Z their width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.mean import sum_over_batch


class Quantized(NamedTuple):
    """By level: codes `[Q, R]` (those of level q are q * K and on), the entries `[Q, R, Z]` that they name, and what
    these quantize, `[Q, R, Z]`, without gradient.
    """

    codes_QR: Tensor
    entries_QRZ: Tensor
    left_QRZ: Tensor


def quantize(rows_RZ: Tensor, books_QKZ: Tensor) -> Quantized:
    """Rows `[R, Z]` by codebooks `[Q, K, Z]`; differentiable in the codebooks."""
    codes, entries, left, left_RZ = [], [], [], rows_RZ.detach()
    for level, book_KZ in enumerate(books_QKZ.unbind(0)):
        chosen_R = nearest(left_RZ, book_KZ)
        entries.append(book_KZ.index_select(0, chosen_R))
        codes.append(chosen_R + level * book_KZ.shape[0])
        left.append(left_RZ)
        left_RZ = left_RZ - entries[-1].detach()
    return Quantized(torch.stack(codes), torch.stack(entries), torch.stack(left))


def nearest(rows_RZ: Tensor, book_KZ: Tensor) -> Tensor:
    """The index of the closest entry for each row, `[R]` int64. No gradient.

    >>> nearest(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]])).tolist()
    [1, 0]
    """
    rows_RZ, book_KZ = rows_RZ.detach(), book_KZ.detach()
    # |r - b|^2 without |r|^2, which is the same for all entries.
    return (book_KZ.square().sum(1) - 2 * rows_RZ @ book_KZ.T).argmin(1)


def usage(codes: Tensor, *, levels: int, entries: int) -> Tensor:
    """How often each entry of each level is used by codes of any shape, `[Q, K]` float32."""
    ones = torch.ones(codes.numel(), device=codes.device)
    return torch.zeros(levels * entries, device=codes.device).index_add(0, codes.flatten(), ones).view(levels, -1)


def perplexity(usage_QK: Tensor) -> Tensor:
    """How many entries are used, in effect: e to the entropy of their shares, of each level, `[Q]`.

    >>> perplexity(torch.tensor([[3.0, 3.0, 0.0], [1.0, 0.0, 0.0]])).tolist()
    [2.0, 1.0]
    """
    share_QK = usage_QK / usage_QK.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(share_QK).sum(1).exp()


def revive(books_QKZ: Tensor, usage_QK: Tensor, rows_QRZ: Tensor, *, key: Tensor, least: float = 1.0) -> Tensor:
    """The codebooks with every entry used less than `least` times re-seated on a row drawn from its level's rows.

    A pure function, to be called now and then between steps with the usage since the last call (Dhariwal et al. 2020,
    Jukebox, "random restarts"). `key`: a random key, int64 `[2]`.
    """
    levels, entries, width = books_QKZ.shape
    drawn_QK = random.randint(key, (levels, entries), low=0, high=rows_QRZ.shape[1])
    seats_QKZ = rows_QRZ.gather(1, drawn_QK[..., None].expand(-1, -1, width)).to(books_QKZ.dtype)
    return torch.where((usage_QK < least)[..., None], seats_QKZ, books_QKZ)


class Averages(NamedTuple):
    """What codebooks that follow their rows remember, a state of the step: how many rows chose each entry of late,
    `[Q, K]`, and their sum, `[Q, K, Z]`; both float32.
    """

    count_QK: Tensor
    sum_QKZ: Tensor

    @staticmethod
    def of(books_QKZ: Tensor) -> "Averages":
        """At the beginning: each entry was chosen once, by itself."""
        return Averages(torch.ones_like(books_QKZ[..., 0], dtype=torch.float32), books_QKZ.detach().float().clone())


def follow(
    averages: Averages, found: Quantized, *, decay: float = 0.99, smooth: float = 1e-5, unit: bool = False
) -> tuple[Averages, Tensor]:
    """The averages after a step, and the codebooks `[Q, K, Z]` that they make (van den Oord et al. 2017, appendix A.1).

    `found`: what a rank's rows chose; on a mesh those of all ranks count. `decay`: what is kept of the averages in a
    step. `smooth`: added to each count, so that an entry which nothing uses stays finite. `unit`: entries are of length
    one. No gradient.
    """
    codes_QR, rows_QRZ = found.codes_QR, found.left_QRZ.detach().to(torch.float32)
    levels, entries = averages.count_QK.shape
    used_QK = sum_over_batch(usage(codes_QR, levels=levels, entries=entries))
    sums = torch.zeros_like(averages.sum_QKZ).flatten(0, 1).index_add(0, codes_QR.flatten(), rows_QRZ.flatten(0, 1))
    sums_QKZ = sum_over_batch(sums.unflatten(0, (levels, entries)))
    count_QK = decay * averages.count_QK + (1 - decay) * used_QK
    sum_QKZ = decay * averages.sum_QKZ + (1 - decay) * sums_QKZ
    total_Q1 = count_QK.sum(1, keepdim=True)
    smoothed_QK = (count_QK + smooth) / (total_Q1 + entries * smooth) * total_Q1
    books_QKZ = sum_QKZ / smoothed_QK[..., None]
    return Averages(count_QK, sum_QKZ), F.normalize(books_QKZ, dim=-1) if unit else books_QKZ
