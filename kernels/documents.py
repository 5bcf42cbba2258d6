"""Where the documents of a pack begin and end, and which documents can be computed together.

A pack says it in one of two ways. *Ids*: an int64 tensor with one number per token, a change of which starts a new
document; kernels then count, and on CUDA the host waits for the count. *`Documents`*: ids and, beside them, offsets
that were computed on the host when the pack was made; nothing is counted and nothing waits.

T tokens of the queries, S tokens of the keys, N documents, P packs.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ftrain.kernels.pack import pack_tokens

TOKENS_TOGETHER = 512
"""Short documents are computed together up to this many tokens, so that copies of a group stay small."""


_LEAST_SLOTS = 8


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one pack, or of several packs one after the other, as a node of a batch.

    - `ids_T`: int64 `[T]`, the id of each token's document; a change of id starts a new document.
    - `offsets_N`: int32 `[N + 1]`; document n is tokens `[offsets[n], offsets[n + 1])`. N is a bound, and the documents
      that are missing have length zero. With P packs each has N / P entries, so the documents of a pack are a slice.
    - `longest`: a bound of the tokens of any document. It is part of a trace: another number is another trace.

    `Documents.of` makes it from ids on the host. Attention on CUDA then neither counts documents nor waits for the
    device.
    """

    ids_T: Tensor
    offsets_N: Tensor
    longest: int = field(metadata={"static": True})

    @staticmethod
    def of(
        segments_T: Tensor, *, max_documents: int | None = None, longest: int | None = None, packs: int = 1
    ) -> "Documents":
        """Documents from ids, int64 `[T]`: of `packs` equal packs, one after the other. The ids are read on the host.

        - `max_documents`: how many documents a pack may have. None takes the most there are, rounded up to a power of
          two (at least 8), so that few shapes occur.
        - `longest`: a bound of the tokens of a document. None takes the tokens of a pack; a smaller bound spares
          kernels work.
        - `packs`: how many equal packs the tokens are, one for each data rank of a mesh.

        ValueError if ids are not int64 `[T]`, a bound is exceeded, the tokens are not `packs` equal packs, or a
        document lies in two packs.

        >>> import torch
        >>> from ftrain.kernels.documents import Documents
        >>> documents = Documents.of(torch.tensor([7, 7, 7, 3, 3]), max_documents=3, longest=4)
        >>> documents.offsets_N
        tensor([0, 3, 5, 5], dtype=torch.int32)
        >>> Documents.of(torch.tensor([7, 7, 7, 3, 3]), max_documents=1)
        Traceback (most recent call last):
        ValueError: a pack has 2 documents, more than max_documents=1: raise it, or pack fewer documents
        """
        _check_ids(segments_T, packs)
        whole = document_offsets(segments_T.cpu()).to(torch.int64)
        length = segments_T.shape[0] // packs
        found = [_of_pack(whole, pack * length, (pack + 1) * length) for pack in range(packs)]
        most = max(len(ends) for ends in found)
        slots = _slots(most, max_documents)
        bound = length if longest is None else longest
        lengths = whole.diff()
        if lengths.numel() and int(lengths.max()) > bound:
            raise ValueError(f"a document has {int(lengths.max())} tokens, more than longest={bound}: raise it")
        rows = [[*ends, *[(pack + 1) * length] * (slots - len(ends))] for pack, ends in enumerate(found)]
        offsets_N = torch.tensor([0, *(end for row in rows for end in row)], dtype=torch.int32)
        return Documents(segments_T, offsets_N.to(segments_T.device), bound)

    @staticmethod
    def equal(documents: int, length: int, device: torch.device) -> "Documents":
        """So many documents of so many tokens each, one after the other.

        >>> Documents.equal(2, 3, torch.device("cpu")).offsets_N
        tensor([0, 3, 6], dtype=torch.int32)
        """
        ids_T = torch.arange(documents, device=device).repeat_interleave(length)
        return Documents(ids_T, torch.arange(documents + 1, dtype=torch.int32, device=device) * length, length)

    def to(self, device: torch.device) -> "Documents":
        """The same on a device."""
        return Documents(self.ids_T.to(device), self.offsets_N.to(device), self.longest)

    def every(self, stride: int) -> "Documents":
        """The documents of every `stride`-th token, from the first on: for a sequence that was downsampled by that
        factor.

        `ids_T` and `longest` shrink with the tokens, and there are as many offsets as before.
        """
        offsets_N = torch.div(self.offsets_N + (stride - 1), stride, rounding_mode="floor")
        return Documents(self.ids_T[::stride], offsets_N, -(-self.longest // stride))


def join_documents(packs: Sequence[Documents]) -> Documents:
    """The documents of packs of equal length, one pack after the other; ids are shifted so that documents stay apart.

    The result has as many tokens as all packs together. Each pack gets as many offsets as the one with the most.

    >>> import torch
    >>> from ftrain.kernels.documents import Documents, join_documents
    >>> pack = Documents.of(torch.tensor([0, 0, 1]), max_documents=2)
    >>> join_documents([pack, pack]).offsets_N
    tensor([0, 2, 3, 5, 6], dtype=torch.int32)
    """
    slots = max(len(pack.offsets_N) for pack in packs) - 1
    step = max(int(pack.ids_T.max()) - int(pack.ids_T.min()) for pack in packs) + 1
    length = packs[0].ids_T.shape[0]
    ids = [pack.ids_T - pack.ids_T.min() + i * step for i, pack in enumerate(packs)]
    offsets = [_filled_up(pack.offsets_N, slots)[1:] + i * length for i, pack in enumerate(packs)]
    return Documents(torch.cat(ids), torch.cat([packs[0].offsets_N[:1], *offsets]), max(p.longest for p in packs))


def stack_documents(packs: Sequence[Documents]) -> Documents:
    """The documents of packs of equal length in a new first dim, as micro-batches have them: ids `[P, T]`, offsets `[P,
    N + 1]` and the largest bound of the packs.
    """
    slots = max(len(pack.offsets_N) for pack in packs) - 1
    offsets = [_filled_up(pack.offsets_N, slots) for pack in packs]
    return Documents(torch.stack([p.ids_T for p in packs]), torch.stack(offsets), max(p.longest for p in packs))


def _filled_up(offsets_N: Tensor, slots: int) -> Tensor:
    """Offsets with so many places, the last of length zero."""
    return torch.cat([offsets_N, offsets_N[-1:].expand(slots + 1 - len(offsets_N))])


def aligned_documents(
    segments_T: Tensor, kv_segments_S: Tensor, *, max_documents: int | None = None, packs: int = 1
) -> tuple[Documents, Documents]:
    """`Documents` of queries and of keys, in which document n of the one reads document n of the other, from ids.

    `segments_T`, `kv_segments_S`: int64 ids; documents meet by equal ids. One that only one side has is empty in the
    other. `max_documents`, `packs`: as in `Documents.of`; documents that either side has count. Both tensors are read
    on the host.

    ValueError if documents that both have come in different orders, if an id names two documents of keys, and in the
    cases of `Documents.of`.

    >>> import torch
    >>> from ftrain.kernels.documents import aligned_documents
    >>> queries, keys = aligned_documents(torch.tensor([1, 1, 2]), torch.tensor([1, 2, 2, 2]), max_documents=2)
    >>> queries.offsets_N, keys.offsets_N
    (tensor([0, 2, 3], dtype=torch.int32), tensor([0, 1, 4], dtype=torch.int32))
    """
    _check_ids(segments_T, packs)
    _check_ids(kv_segments_S, packs)
    pairs = zip(segments_T.cpu().chunk(packs), kv_segments_S.cpu().chunk(packs), strict=True)
    lengths = [aligned_lengths(ids_T, kv_ids_S) for ids_T, kv_ids_S in pairs]
    slots = _slots(max(len(found) for found in lengths), max_documents)
    made = []
    for side, ids_T in enumerate((segments_T, kv_segments_S)):
        rows = [[pair[side] for pair in found] + [0] * (slots - len(found)) for found in lengths]
        offsets_N = torch.tensor([0, *accumulate(n for row in rows for n in row)], dtype=torch.int32)
        made.append(Documents(ids_T, offsets_N.to(ids_T.device), ids_T.shape[0] // packs))
    return made[0], made[1]


def aligned_lengths(segments_T: Tensor, kv_segments_S: Tensor) -> list[tuple[int, int]]:
    """Tokens of each document among queries and among keys, 0 where it is absent, in the order that both have.

    ids int64 `[T]` and `[S]`, read on the host. ValueError if an id names two documents of keys, or if documents that
    both have come in different orders.
    """
    q, k = _runs(segments_T, segments_T.shape[0]), _runs(kv_segments_S, kv_segments_S.shape[0])
    _require_unique([name for name, _, _ in k], "kv_segments_S")
    place = {name: i for i, (name, _, _) in enumerate(k)}
    found, at = list[tuple[int, int]](), 0
    for name, _, length in q:
        if name not in place:
            found.append((length, 0))
            continue
        if place[name] < at:
            raise ValueError(f"document {name} comes in another order among the keys: lay both packs out in one order")
        found += [(0, n) for _, _, n in k[at : place[name]]]
        found.append((length, k[place[name]][2]))
        at = place[name] + 1
    return found + [(0, n) for _, _, n in k[at:]]


def _require_unique(names: list[int], argument: str) -> None:
    seen = set[int]()
    for name in names:
        if name in seen:
            raise ValueError(f"{argument}: id {name} names two documents; equal ids must be adjacent")
        seen.add(name)


Segments = Tensor | Documents
"""How a pack says where its documents are: ids `[T]`, or `Documents`."""


def one_document(x_T: Tensor) -> Documents:
    """The pack of these tokens (`[T, ...]`) as one document, on their device. Traceable; on a mesh it is the whole
    pack.
    """
    tokens = pack_tokens(x_T.shape[0])
    offsets_N = torch.arange(2, dtype=torch.int32, device=x_T.device) * tokens
    return Documents(torch.zeros(x_T.shape[0], dtype=torch.int64, device=x_T.device), offsets_N, tokens)


def ids_of(segments: Segments) -> Tensor:
    """The id of each token's document, int64 `[T]`."""
    return segments.ids_T if isinstance(segments, Documents) else segments


def every(segments: Segments, stride: int) -> Segments:
    """The documents of every `stride`-th token, from the first on, in the form in which they were given.

    Ids `[T]` give ids of the tokens that are left, `Documents` give `Documents` with as many offsets as before.

    >>> import torch
    >>> from ftrain.kernels.documents import every
    >>> every(torch.tensor([0, 0, 0, 0, 1, 1]), 2)
    tensor([0, 0, 1])
    """
    return segments.every(stride) if isinstance(segments, Documents) else segments[::stride]


def _check_ids(segments_T: Tensor, packs: int) -> None:
    if segments_T.dim() != 1 or segments_T.dtype != torch.int64:
        raise ValueError(f"Documents.of wants int64 ids [T], not {segments_T.dtype} {[*segments_T.shape]}")
    if packs < 1 or segments_T.shape[0] % packs:
        raise ValueError(f"Documents.of: {segments_T.shape[0]} tokens are not {packs} equal packs")


def _slots(most: int, max_documents: int | None) -> int:
    """How many documents the offsets of a pack have room for; ValueError if some pack has more."""
    slots = max(_LEAST_SLOTS, 1 << (most - 1).bit_length()) if max_documents is None else max_documents
    if most > slots:
        raise ValueError(
            f"a pack has {most} documents, more than max_documents={slots}: raise it, or pack fewer documents"
        )
    return slots


def _of_pack(offsets: Tensor, start: int, end: int) -> list[int]:
    """Where the documents of tokens `[start, end)` end; ValueError if one begins before or goes on behind."""
    inside = offsets[(offsets >= start) & (offsets <= end)].tolist()
    if start < end and (not inside or inside[0] != start or inside[-1] != end):
        border = start if not inside or inside[0] != start else end
        raise ValueError(
            f"a document lies in two packs: it goes on over token {border}, where a pack begins; pack documents so "
            "that none does (ftrain.modules.mesh_packing), or give it another id there"
        )
    return inside[1:]


def document_index(segments_T: Tensor) -> Tensor:
    """The number of each token's document, counted from 0: int64 `[T]` of ids int64 `[T]`. Traceable, and works under
    `vmap`.

    >>> import torch
    >>> from ftrain.kernels.documents import document_index
    >>> document_index(torch.tensor([7, 7, 3, 3, 7]))
    tensor([0, 0, 1, 1, 2])
    """
    change_T = segments_T[1:] != segments_T[:-1]
    return torch.cat([torch.zeros_like(segments_T[:1], dtype=torch.int64), change_T.cumsum(0)])


def index_of_offsets(offsets_N: Tensor, tokens: int) -> Tensor:
    """The number of each token's document from offsets int32 `[N + 1]`: int64 `[tokens]`. Traceable."""
    at_T1 = torch.arange(tokens, device=offsets_N.device)[:, None]
    return (at_T1 >= offsets_N[1:]).sum(1)


def document_offsets(segments_T: Tensor) -> Tensor:
    """Cumulative offsets of the documents of a pack, int32 `[N + 1]`: document `n` is tokens `[cu[n], cu[n + 1])`.

    `segments_T`: ids, int64 `[T]`. The size depends on the data, so the host waits for a CUDA device.

    >>> import torch
    >>> from ftrain.kernels.documents import document_offsets
    >>> document_offsets(torch.tensor([7, 7, 3, 3, 7]))
    tensor([0, 2, 4, 5], dtype=torch.int32)
    """
    T = segments_T.shape[0]
    change_T = segments_T[1:] != segments_T[:-1]
    inner = change_T.nonzero().flatten() + 1
    ends = inner.new_tensor([T] if T else [])
    return torch.cat([inner.new_zeros(1), inner, ends]).to(torch.int32)


@dataclass(frozen=True)
class Pair:
    """One document: its queries are tokens `[q_start, q_start + q_length)`, its keys likewise."""

    q_start: int
    q_length: int
    k_start: int
    k_length: int


def document_pairs(segments_T: Tensor | None, kv_segments_S: Tensor | None, T: int, S: int) -> list[Pair]:
    """The documents of a pack of T queries and S keys, with their keys. The ids are read on the host; None is one
    document.

    With `kv_segments_S` a document's keys are those with its id; documents without keys are left out. ValueError if an
    id names two documents of queries or of keys, because then it is not said which keys belong to which queries.
    """
    if kv_segments_S is None:
        return [Pair(start, length, start, length) for _, start, length in _runs(segments_T, T)]
    queries, runs = _runs(segments_T, T), _runs(kv_segments_S, S)
    _require_unique([name for name, _, _ in queries], "segments_T")
    _require_unique([name for name, _, _ in runs], "kv_segments_S")
    keys = {name: (start, length) for name, start, length in runs}
    return [Pair(start, length, *keys[name]) for name, start, length in queries if name in keys]


def offset_pairs(offsets_N: Tensor, kv_offsets_N: Tensor | None) -> list[Pair]:
    """The documents that offsets int32 `[N + 1]` describe, with their keys: document n of the queries reads document n
    of the keys (None: the same offsets).

    Documents without queries or without keys are left out. The offsets are read on the host.
    """
    q = list(pairwise(offsets_N.tolist()))
    k = q if kv_offsets_N is None else list(pairwise(kv_offsets_N.tolist()))
    both = zip(q, k, strict=True)
    return [Pair(a, b - a, c, d - c) for (a, b), (c, d) in both if a < b and c < d]


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
    """Documents of equal lengths in groups of at most `limit` query or key tokens (or one document), longest first."""
    groups: defaultdict[tuple[int, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.q_length, pair.k_length].append(pair)
    for lengths in sorted(groups, reverse=True):
        together = max(1, limit // max(lengths))
        for i in range(0, len(groups[lengths]), together):
            yield groups[lengths][i : i + together]


def rows(starts: list[int], length: int, device: torch.device) -> slice | Tensor:
    """The tokens of documents of one length: a slice when the documents are adjacent, else an index int64 on
    `device`.
    """
    if all(b - a == length for a, b in pairwise(starts)):
        return slice(starts[0], starts[0] + len(starts) * length)
    index = torch.tensor(starts)[:, None] + torch.arange(length)
    return index.flatten().to(device)
