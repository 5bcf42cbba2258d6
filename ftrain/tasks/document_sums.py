"""Sums over the documents of a batch, told at each of their tokens, so that no shape depends on how many there are.

T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.batches import folded, row_documents
from ftrain.kernels.documents import ids_of
from ftrain.kernels.whole_batch import within_documents


def document_ids(batch: Mapping[str, Any]) -> Tensor:
    """The number of each token's document, int64 `[T]`, for a pack or for rows `[B, L]`, which are folded.

    Neighbours have different numbers; numbers may come again in another pack.
    """
    tokens = batch["tokens"]
    segments = folded(batch.get("segments"), tokens)
    if segments is not None:
        return ids_of(segments)
    if tokens.dim() == 1:
        return torch.zeros_like(tokens)
    return row_documents(len(tokens), tokens.shape[1], tokens.device)


def first_tokens(ids_T: Tensor) -> Tensor:
    """Whether a token is the first of its document, bool `[T]`."""
    with within_documents():
        first_T = torch.ones_like(ids_T, dtype=torch.bool)
        first_T[1:] = ids_T[1:] != ids_T[:-1]
        return first_T


def sum_by_run(x_T: Tensor, first_T: Tensor) -> Tensor:
    """At each token the sum of `x_T` over its run, `[T]`; runs begin at the tokens that are `first_T` (bool `[T]`).

    ValueError on a mesh whose ranks share documents (a sequence axis).

    >>> first_T = torch.tensor([True, False, True, False])
    >>> sum_by_run(torch.tensor([1.0, 2.0, 3.0, 4.0]), first_T)
    tensor([3., 3., 7., 7.])
    """
    with within_documents():
        run_T = (first_T.long().cumsum(0) - 1).clamp(min=0)
        return torch.zeros_like(x_T).index_add(0, run_T, x_T)[run_T]
