"""Documents that begin as the one before them does, whose beginning is computed once: answers to one question.

A pack holds `[question answer][other answer]`. The tokens of the second document read the question's keys and values
too, and stand where they would behind it. Layers that work token by token run once on the question; attention is given
keys and values in which it stands twice.

T tokens, S = 2 T rows of keys, G key/value heads, K head dim, N documents.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.attention import attention
from ftrain.kernels.documents import Documents, Segments, document_index, ids_of
from ftrain.kernels.primitive import bind
from ftrain.kernels.whole_batch import within_documents

__all__ = ["SharedPrefixes", "reading_prefixes", "require_plain", "shared_prefixes"]


class SharedPrefixes(NamedTuple):
    """Where keys are taken from, and whose they are.

    - `place_S`: int64, the token that each row of keys is of. `used_S`: bool, False for rows that nobody reads.
    - `queries`, `keys`: the documents of tokens and of keys, both `Documents` or both ids. `told`: those of tokens as
      they were given.
    - `shift_T`: int64, how many tokens stand before a token's document in its beginning: what its position lacks.
    """

    place_S: Tensor
    used_S: Tensor
    queries: Segments
    keys: Segments
    told: Segments
    shift_T: Tensor


def shared_prefixes(segments: Segments, prefix_T: Tensor) -> SharedPrefixes:
    """What attention is given of documents that share their beginnings. Traceable; shapes depend on T alone.

    - `segments`: ids int64 `[T]`, equal ids adjacent, or `Documents`.
    - `prefix_T`: int64; at the first token of a document the number of tokens at the beginning of the document before
      it that it begins with too, at most as many as that has; 0 for none, and at all other tokens.

    ValueError on a mesh whose ranks share documents.

    >>> import torch
    >>> shared = shared_prefixes(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 2, 0]))
    >>> shared.place_S[shared.used_S].tolist()
    [0, 1, 2, 0, 1, 3, 4]
    >>> shared.shift_T.tolist()
    [0, 0, 0, 2, 2]
    """
    ids_T = ids_of(segments)
    T = ids_T.shape[0]
    with within_documents():
        at_T = torch.arange(T, device=ids_T.device)
        first_T = torch.cat([torch.ones_like(ids_T[:1], dtype=torch.bool), ids_T[1:] != ids_T[:-1]])
        start_T = torch.where(first_T, at_T, 0).cummax(0).values
        before_T = torch.cat([start_T[:1], start_T[:-1]])  # at a first token: where the document before it begins
        prefix_T = torch.where(first_T, prefix_T, 0)
        end_T = (1 + prefix_T).cumsum(0)
        begin_T = end_T - 1 - prefix_T
        row_S = torch.arange(2 * T, device=ids_T.device)
        used_S = row_S < end_T[-1:]
        of_S = torch.searchsorted(end_T, row_S, right=True).clamp(max=T - 1)
        within_S = row_S - begin_T[of_S]
        place_S = torch.where(within_S < prefix_T[of_S], before_T[of_S] + within_S, of_S)
        queries, keys = _documents(segments, begin_T, end_T, of_S, used_S)
        return SharedPrefixes(torch.where(used_S, place_S, 0), used_S, queries, keys, segments, prefix_T[start_T])


def _documents(
    segments: Segments, begin_T: Tensor, end_T: Tensor, of_S: Tensor, used_S: Tensor
) -> tuple[Segments, Segments]:
    """The documents of queries and keys; rows that nobody reads are a document without queries."""
    index_T = document_index(ids_of(segments))
    kv_index_S = torch.where(used_S, index_T[of_S], -1)
    if not isinstance(segments, Documents):
        return index_T, kv_index_S
    rows = of_S.shape[0]
    offsets_N = torch.cat([segments.offsets_N, segments.offsets_N[-1:]])
    begins = torch.cat([begin_T, end_T[-1:]])[segments.offsets_N.long()]
    kv_offsets_N = torch.cat([begins, torch.full_like(begins[:1], rows)]).to(offsets_N.dtype)
    queries = Documents(index_T, offsets_N, segments.longest)
    return queries, Documents(kv_index_S, kv_offsets_N, min(2 * segments.longest, rows))


@contextmanager
def reading_prefixes(shared: SharedPrefixes) -> Iterator[None]:
    """Within the block, causal attention of the pack's tokens to themselves reads shared beginnings too.

    All that mixes tokens must be that attention (`ftrain.tasks.shared_prompts` proves it of a model). ValueError as
    `require_plain`.
    """
    inner = attention.bound()  # type: ignore[attr-defined]

    def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, **options: Any) -> Tensor:
        require_plain(options, shared.told)
        k_SGK, v_SGK = (_rows(x, shared) for x in (k_TGK, v_TGK))
        others = {**options, "segments_T": shared.queries, "kv_segments_S": shared.keys}
        found: Tensor = inner(q_THK, k_SGK, v_SGK, **others)
        return found

    with bind({"attention": attend}):
        yield


def require_plain(options: Mapping[str, Any], segments: Segments) -> None:
    """ValueError for options of attention that is not causal, not of the pack's tokens to themselves, or of other
    documents than `segments` (chunks of them, as some layers have).
    """
    told = options.get("segments_T")
    own = told is segments or (isinstance(segments, Documents) and told is segments.ids_T)
    if not options.get("causal", True) or options.get("kv_segments_S") is not None or not own:
        raise ValueError(
            "documents that share their beginnings are for causal attention of a pack's documents to themselves: lay "
            "them out one by one"
        )


def _rows(x_TGK: Tensor, shared: SharedPrefixes) -> Tensor:
    """The rows of keys; those that nobody reads are zero, and give no gradient whatever a kernel leaves in theirs."""
    return torch.where(shared.used_S[:, None, None], x_TGK[shared.place_S], 0)
