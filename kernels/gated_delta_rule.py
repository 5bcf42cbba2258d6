"""The gated delta rule: a memory of keys and values, a matrix per head, that forgets and is corrected token by token.

With state `S`, decay `a`, rate `b`: `S = a S; S += b k (v - k S); out = q S`. Worked out chunk by chunk, so that most
of it is products of matrices; a document starts with an empty memory, wherever it begins in a chunk.

Legend: B rows, H heads, L tokens of a row, C tokens of a chunk, N chunks, K key dim, V value dim. Source: Yang et al.,
"Gated delta networks", arXiv 2412.06464.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.memory_scan import before, memory_scan

CHUNK = 64


def gated_delta_rule(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLV: Tensor,
    log_decay_BHL: Tensor,
    rate_BHL: Tensor,
    *,
    documents_BL: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """What each query reads, `[B, H, L, V]` in the dtype of the queries, and the memory at each row's end
    `[B, H, K, V]`.

    - `q_BHLK`, `k_BHLK`, `v_BHLV`: floating; queries scaled as they are to be read.
    - `log_decay_BHL`: at most 0. `rate_BHL`: 0 changes nothing.
    - `documents_BL`: int64 ids, at least 0, equal ids adjacent; None is one document in each row.
    - `chunk`: tokens of a chunk; the result does not depend on it but for rounding.

    Computed in float32 (float64 for float64), differentiable to any order. Cost grows with `L * chunk`, the number of
    ops does not grow with L.

    >>> import torch
    >>> from ftrain.kernels.gated_delta_rule import gated_delta_rule
    >>> one_BHLK, off_BHL = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 3)
    >>> v_BHLV, documents_BL = torch.arange(1.0, 4.0).view(1, 1, 3, 1), torch.tensor([[0, 0, 1]])
    >>> out, _ = gated_delta_rule(one_BHLK, one_BHLK, v_BHLV, off_BHL, off_BHL + 0.5, documents_BL=documents_BL)
    >>> out.flatten()
    tensor([0.5000, 1.2500, 1.5000])
    """
    wide, length = accumulate_dtype(q_BHLK.dtype), q_BHLK.shape[2]
    q, k, v, decay, rate = (_chunked(x.to(wide), chunk) for x in (q_BHLK, k_BHLK, v_BHLV, log_decay_BHL, rate_BHL))
    where = _places(documents_BL, q_BHLK, chunk)
    total = decay.cumsum(-1)  # of a chunk up to and with each token
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~where.earlier, -torch.inf).exp()
    since = total.exp()[..., None] * where.goes_on[..., None]
    until = (total[..., -1:] - total).exp()[..., None] * where.lasts[..., None]
    kept = total[..., -1].exp() * where.goes_on[..., -1]
    # (1 + strictly lower part) x = rate * (v - k S) solved for all tokens of a chunk at once
    system = ((k * rate[..., None]) @ k.mT) * between
    right = torch.cat([v * rate[..., None], k * rate[..., None] * since], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, read = solved.split((v.shape[-1], k.shape[-1]), -1)
    written = k * until
    state = memory_scan(kept, written, read, written.mT @ new)
    met = before(state)
    out = (q * since) @ met + ((q @ k.mT) * between) @ (new - read @ met)
    return out.flatten(2, 3)[:, :, :length].to(q_BHLK.dtype), state[:, :, -1]


def gated_delta_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, rate_BH: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """One more token of each row: what it reads, `[B, H, V]` in the dtype of the queries, and the new memory."""
    wide = state_BHKV.dtype
    q, k, v, decay, rate = (x.to(wide) for x in (q_BHK, k_BHK, v_BHV, log_decay_BH, rate_BH))
    state_BHKV = state_BHKV * decay.exp()[..., None, None]
    change_BHV = (v - (k[..., None, :] @ state_BHKV).squeeze(-2)) * rate[..., None]
    state_BHKV = state_BHKV + k[..., :, None] * change_BHV[..., None, :]
    return (q[..., None, :] @ state_BHKV).squeeze(-2).to(q_BHK.dtype), state_BHKV


class _Places(NamedTuple):
    """Which tokens of chunks meet: `earlier [.., N, C, C]`: key j is of query i's document and not after it; `goes_on
    [.., N, C]`: the document began before the chunk; `lasts [.., N, C]`: it goes up to the chunk's end.
    """

    earlier: Tensor
    goes_on: Tensor
    lasts: Tensor


def _places(documents_BL: Tensor | None, q_BHLK: Tensor, chunk: int) -> _Places:
    rows, length = q_BHLK.shape[0], q_BHLK.shape[2]
    ids_BL = torch.zeros(rows, length, dtype=torch.int64, device=q_BHLK.device)
    ids_BL = ids_BL if documents_BL is None else documents_BL
    # padding goes on with the last document: it changes nothing, and the row's memory is that of its end
    pad = -length % chunk
    ids_BL = torch.cat([ids_BL, ids_BL[:, -1:].expand(-1, pad)], 1)
    ids_B1NC = ids_BL.unflatten(1, (-1, chunk))[:, None]
    before = F.pad(ids_B1NC[..., -1], (1, -1), value=-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=ids_BL.device).tril()
    return _Places(
        (ids_B1NC[..., :, None] == ids_B1NC[..., None, :]) & lower,
        ids_B1NC == before[..., None],
        ids_B1NC == ids_B1NC[..., -1:],
    )


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """`[B, H, L, ...]` to `[B, H, N, C, ...]`, with zeros behind the end."""
    pad = -x.shape[2] % chunk
    x = torch.cat([x, x.new_zeros(*x.shape[:2], pad, *x.shape[3:])], 2) if pad else x
    return x.unflatten(2, (-1, chunk))
