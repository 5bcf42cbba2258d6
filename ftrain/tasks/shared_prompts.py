"""Answers to one question in one pack: the question's tokens are computed once.

The second document of a pair has only what is its own, and its first token says in the leaf `prefix` how many tokens at
the beginning of the document before it stand before it too (`ftrain.kernels.shared_prefix`).

T tokens of the batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from ftrain.bridge.proof import ALONE, example, mixing, packed
from ftrain.data.documents import IGNORE, Document
from ftrain.kernels.documents import Segments
from ftrain.kernels.primitive import bind
from ftrain.kernels.shared_prefix import reading_prefixes, require_plain, shared_prefixes
from ftrain.modules.model import Model
from ftrain.modules.spec import abstract
from ftrain.tasks.task import without

PREFIX = "prefix"
"""The leaf of a batch whose documents share their beginnings."""


@contextmanager
def sharing(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch that the model reads: without `prefix`, and with positions behind shared beginnings, which attention
    reads within the block. A batch without `prefix` is given as it is.

    ValueError for rows `[B, L]`, and on a mesh whose ranks share documents.
    """
    texts = without(batch, PREFIX)
    if PREFIX not in batch:
        yield texts
        return
    if batch["tokens"].dim() != 1 or "segments" not in batch:
        raise ValueError(
            "documents share their beginnings in packs, tokens [T] with segments: give rows without 'prefix'"
        )
    shared = shared_prefixes(batch["segments"], batch[PREFIX])
    with reading_prefixes(shared):
        yield {**texts, "positions": texts["positions"] + shared.shift_T}


def why_not_shared(model: Model) -> str:
    """Why documents cannot share their beginnings in this model, in words; empty if they can: all that mixes its tokens
    is causal attention to the tokens of their document.
    """
    if not model.packs:
        return model.alone or "its documents cannot share a pack"
    if model.hidden is None or model.state:
        return "it has no hidden states of its own" if model.hidden is None else "it has state"
    if model.media is not None:
        return "its encoders of media attend too, each to its own"
    try:
        traced = packed(_checked(model), abstract(model.specs), example())
    except ValueError as error:
        return str(error)
    ours = {str(node.target).removeprefix("ftrain.").partition(".")[0] for node in traced.module.graph.nodes
            if str(node.target).startswith("ftrain.")}  # fmt: skip
    other = sorted(ours - _BY_TOKEN)
    return f"{other[0]} is not known to work token by token" if other else mixing(traced)


_BY_TOKEN = frozenset({"rms_norm", "rope", "swiglu", "wide_mm"})
"""The library's ops of single tokens."""


def _checked(model: Model) -> Any:
    """The hidden states of a model whose attention is looked at, and stands for ops of single tokens."""

    def run(params: Any, batch: Mapping[str, Any]) -> Tensor:
        with bind({"attention": _of(batch["segments"]), "embedding": lambda tokens_T, table_VD: table_VD[tokens_T]}):
            found: Tensor = model.hidden(params, batch)  # type: ignore[misc]
            return found

    return run


def _of(segments: Segments) -> Any:
    def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, **options: Any) -> Any:
        require_plain(options, segments)
        return ALONE["attention"](q_THK, k_TGK, v_TGK, **options)

    return attend


def shared_documents(first: Document, second: Document) -> tuple[Document, Document]:
    """Both documents, the second without what it has in common with the first's beginning, and `prefix` leaves.

    What has labels is never shared, nor the token before it, whose label is each one's own; nor media.

    >>> first, second = (
    ...     Document(np.array([5, 6, 7, n]), np.array([IGNORE, IGNORE, n, IGNORE])) for n in (8, 9)
    ... )
    >>> second = shared_documents(first, second)[1]
    >>> second.tokens.tolist(), second.leaves["prefix"].tolist()
    ([7, 9], [2, 0])
    """
    count = _common(first, second)
    prefixes = [np.zeros(len(first), np.int64), np.zeros(len(second) - count, np.int64)]
    prefixes[1][0] = count
    leaves = [dict(first.leaves), {name: leaf[count:] for name, leaf in second.leaves.items()}]
    return (
        Document(first.tokens, first.labels, {**leaves[0], PREFIX: prefixes[0]}, first.parts, first.media),
        Document(second.tokens[count:], second.labels[count:], {**leaves[1], PREFIX: prefixes[1]}, second.parts,
                 second.media),
    )  # fmt: skip


def _common(first: Document, second: Document) -> int:
    """How many tokens at their beginnings both have and neither has labels for."""
    if first.parts or second.parts or first.media or second.media:
        return 0
    most = min(len(first), len(second)) - 1
    ends = [
        _first(first.tokens[:most] != second.tokens[:most]),
        *(_first(d.labels[:most] != IGNORE) for d in (first, second)),
    ]
    return max(0, min(most, *ends))


def _first(true_n: np.ndarray) -> int:
    """The place of the first True, or how many there are."""
    found = np.flatnonzero(true_n)
    return int(found[0]) if found.size else len(true_n)
