"""Where the documents of a pack begin and end, and which documents can be computed together.

T tokens of the queries, S tokens of the keys, N documents.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TOKENS_TOGETHER = 512
"""Short documents are computed together up to this many tokens, so that copies of a group stay small."""


def document_index(segments_T: Tensor) -> Tensor:
    """The number of each token's document, counted from 0, int64 `[T]`. Traceable, and works under `vmap`."""
    change_T = segments_T[1:] != segments_T[:-1]
    return torch.cat([torch.zeros_like(segments_T[:1], dtype=torch.int64), change_T.cumsum(0)])


def document_offsets(segments_T: Tensor, *, max_documents: int | None = None) -> Tensor:
    """Cumulative offsets of the documents of a pack, int32 `[N + 1]`: document `n` is tokens `[cu[n], cu[n + 1])`.

    Without `max_documents` the size depends on the data, so a CUDA device is waited for. With it the result always has
    `max_documents + 1` entries, the documents that are missing have length zero, nothing waits and the call can be
    traced; more documents than that raise `RuntimeError`, on CUDA by an assertion on the device.
    """
    T = segments_T.shape[0]
    change_T = segments_T[1:] != segments_T[:-1]
    if max_documents is None:
        inner = change_T.nonzero().flatten() + 1
        ends = inner.new_tensor([T] if T else [])
        return torch.cat([inner.new_zeros(1), inner, ends]).to(torch.int32)
    return _padded_offsets(document_index(segments_T), max_documents)


def _padded_offsets(index_T: Tensor, max_documents: int) -> Tensor:
    fits = (index_T < max_documents).all()
    message = f"the pack has more documents than max_documents={max_documents}: raise it, or pack fewer documents"
    torch._assert_async(fits, message)
    counts_N = torch.zeros(max_documents, dtype=torch.int64, device=index_T.device)
    counts_N = counts_N.scatter_add(0, index_T.clamp(max=max_documents - 1), torch.ones_like(index_T))
    return torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)]).to(torch.int32)


@dataclass(frozen=True)
class Pair:
    """One document: its queries are tokens `[q_start, q_start + q_length)`, its keys likewise."""

    q_start: int
    q_length: int
    k_start: int
    k_length: int


def document_pairs(segments_T: Tensor | None, kv_segments_S: Tensor | None, T: int, S: int) -> list[Pair]:
    """The documents of a pack, with their keys. Reads the segments on the host.

    With `kv_segments_S` a document's keys are those with its id; documents without keys are left out. `ValueError` if
    an id names two documents, because then its keys are ambiguous.
    """
    if kv_segments_S is None:
        return [Pair(start, length, start, length) for _, start, length in _runs(segments_T, T)]
    keys = {}
    for name, start, length in _runs(kv_segments_S, S):
        if name in keys:
            raise ValueError(f"kv_segments_S: id {name} names two documents; equal ids must be adjacent")
        keys[name] = (start, length)
    return [Pair(start, length, *keys[name]) for name, start, length in _runs(segments_T, T) if name in keys]


def _runs(segments_T: Tensor | None, T: int) -> list[tuple[int, int, int]]:
    """`(id, start, length)` of each document."""
    if segments_T is None:
        return [(0, 0, T)] if T else []
    ids, counts = torch.unique_consecutive(segments_T, return_counts=True)
    lengths = counts.tolist()
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return list(zip(ids.tolist(), starts[:-1], lengths, strict=True))


def batches(pairs: list[Pair], limit: int = TOKENS_TOGETHER) -> Iterator[list[Pair]]:
    """Documents of equal lengths, together up to `limit` query or key tokens, longest first."""
    groups: defaultdict[tuple[int, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.q_length, pair.k_length].append(pair)
    for lengths in sorted(groups, reverse=True):
        together = max(1, limit // max(lengths))
        for i in range(0, len(groups[lengths]), together):
            yield groups[lengths][i : i + together]


def rows(starts: list[int], length: int, device: torch.device) -> slice | Tensor:
    """Which tokens documents of one length are: a slice when they lie one after the other, else an index."""
    if all(b - a == length for a, b in pairwise(starts)):
        return slice(starts[0], starts[0] + len(starts) * length)
    index = torch.tensor(starts)[:, None] + torch.arange(length)
    return index.flatten().to(device)
