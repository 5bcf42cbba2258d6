"""Batches of a language model: one pack of documents, or rows of one document each.

Legend: T tokens of a pack, B rows, L tokens of a row.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.documents import Documents, Segments, document_index, ids_of
from ftrain.kernels.mean import Mean
from ftrain.kernels.pack import pack_index, pack_tokens
from ftrain.modules.model import Leaf

LANGUAGE = {
    "tokens": Leaf("ids of tokens", "[T] or [B, L]", needed=True),
    "labels": Leaf("the token that each is to predict, or -100", "that of the tokens"),
    "positions": Leaf("places of the tokens in their documents; counted if absent", "that of the tokens"),
    "segments": Leaf("ids of documents, which change where one ends; absent: a row is one document", "[T] or [B, L]"),
}
IGNORED = -100


def rows(x: Tensor) -> Tensor:
    """A pack as one row, `[1, T]`; rows as they are."""
    return x[None] if x.dim() == 1 else x


def row_documents(rows: int, length: int, device: torch.device) -> Tensor:
    """Ids of the folded tokens of rows that are a document each, int64 `[rows * length]`."""
    return torch.arange(rows, device=device).repeat_interleave(length)


def folded(segments: Segments | None, tokens: Tensor) -> Segments | None:
    """Documents of the folded `tokens`, `[T]` or `[B, L]`; in rows, a document ends with its row. None where each row
    is one document.
    """
    if segments is None or tokens.dim() == 1:
        return segments
    ids_BL = ids_of(segments) if not isinstance(segments, Tensor) else segments
    index = document_index(ids_BL.flatten()).unflatten(0, tokens.shape)
    return (index + tokens.shape[1] * torch.arange(len(tokens), device=tokens.device)[:, None]).flatten()


def positions(batch: Mapping[str, Any]) -> Tensor | None:
    """The places of the tokens in their documents, as rows: given, or counted; None where a model counts by itself.

    ValueError where ranks share a pack whose documents are given as ids alone: none knows where theirs began.
    """
    given, segments = batch.get("positions"), batch.get("segments")
    if given is not None:
        return rows(given)
    tokens = rows(batch["tokens"])
    length = tokens.shape[1]
    whole = pack_tokens(length) == length
    if isinstance(segments, Documents):
        place_T = pack_index(length, tokens.device)
        start_T = segments.offsets_N[torch.searchsorted(segments.offsets_N, place_T, right=True) - 1]
        return (place_T - start_T)[None]
    if segments is None:
        return None if whole else pack_index(length, tokens.device)[None]
    if not whole:
        raise ValueError(
            "the ranks of a sequence axis share the pack, and ids do not tell where a document began: give the batch's "
            "'positions' too, or its segments as Documents"
        )
    ids_BL, place_L = segments.reshape(tokens.shape), torch.arange(length, device=tokens.device)
    first = torch.ones_like(ids_BL, dtype=torch.bool)
    first[:, 1:] = ids_BL[:, 1:] != ids_BL[:, :-1]
    return place_L - torch.where(first, place_L, 0).cummax(1).values


def counted(tokens_BL: Tensor, padding: int) -> dict[str, Tensor]:
    """What a model that counts the tokens of each row by itself makes of rows: `lengths`, those of the rows, and which
    places it attends to, `attention_mask`, bool `[B, L]`. Such a model asserts that no length is too great, which is
    known of these.
    """
    rows, length = tokens_BL.shape
    count_B = (tokens_BL != padding).sum(1)
    return {
        "lengths": torch.full((rows,), length, device=tokens_BL.device),
        "attention_mask": torch.arange(length, device=tokens_BL.device) < count_B[:, None],
    }


def mean_over_labels(total: Tensor, labels: Tensor) -> Mean:
    """The mean of a `total`, 0-d, over the tokens that have a label; `labels` of any shape."""
    return Mean(total, (labels != IGNORED).sum().to(total.dtype))


def places_of(batch: Mapping[str, Any]) -> Tensor:
    """The positions of the folded tokens in their documents, int64 `[T]`. ValueError as `positions`."""
    tokens, place = batch["tokens"], positions(batch)
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape) if place is None else place
    return place.reshape(-1)


def documents_of(batch: Mapping[str, Any]) -> Segments | None:
    """The documents of the folded tokens: a row is one, where nothing is said."""
    tokens = batch["tokens"]
    if batch.get("segments") is None and tokens.dim() > 1:
        return row_documents(len(tokens), tokens.shape[1], tokens.device)
    return folded(batch.get("segments"), tokens)


def require_tokens(name: str, batch: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> None:
    """ValueError for a batch without a leaf that the model `name` needs, or with one that it does not know."""
    missing = [leaf for leaf, about in leaves.items() if about.needed and leaf not in batch]
    if missing:
        raise ValueError(f"{name}: the batch has no {missing[0]!r} ({leaves[missing[0]].means})")
    unknown = [leaf for leaf in batch if leaf not in leaves]
    if unknown:
        raise ValueError(
            f"{name}: the batch has {unknown[0]!r}, which the model does not read; it reads {', '.join(leaves)}"
        )


def require_made(batch: Mapping[str, Any], raw: Iterable[str]) -> None:
    """ValueError that names a leaf of media as it came (any of `raw`), which `model.media` has not seen."""
    found = next((leaf for leaf in raw if leaf in batch), None)
    if found is not None:
        raise ValueError(f"the batch has {found!r} as it came: give what model.media(batch) makes of it")
