"""Documents of tokens with their labels, and a pack of them as the arrays that a step reads.

T tokens of a pack, n tokens of a document.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ftrain.data.sample import Part, Place
from ftrain.modules.packing import padding

IGNORE = -100
"""The label of a place that is not trained on."""

_OWN = ("tokens", "labels", "positions", "segments")


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens that see each other and nothing else.

    Args:
        tokens: int64 `[n]`, n at least 1.
        labels: int64 `[n]`, already shifted: the label *for* place t is the token at t + 1, or `IGNORE`; the last one
            is `IGNORE`.
        leaves: further arrays `[n, ...]` of any dtype, one row a token.
        parts: media that some of the tokens stand for, in their order, with the row that they are of: what `media` is
            read from, when the document's turn comes (`ftrain.data.media_finishing`).
        media: arrays of media by the names of the model's leaves, with rows of their own.

    ValueError where tokens, labels and leaves differ in length or dtype.
    """

    tokens: np.ndarray
    labels: np.ndarray
    leaves: Mapping[str, np.ndarray] = field(default_factory=dict)
    parts: tuple[tuple[Part, Place], ...] = ()
    media: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.leaves) & set(_OWN):
            raise ValueError(f"leaves of a document are named {sorted(self.leaves)}: {', '.join(_OWN)} are its own")
        arrays = {"tokens": self.tokens, "labels": self.labels, **self.leaves}
        lengths = {name: array.shape[:1] for name, array in arrays.items()}
        if len(set(lengths.values())) > 1 or not len(self.tokens):
            raise ValueError(f"the arrays of a document have lengths {lengths}: they must be equal and at least 1")
        for name in ("tokens", "labels"):
            if arrays[name].dtype != np.int64 or arrays[name].ndim != 1:
                raise ValueError(f"{name} of a document are {arrays[name].dtype} {arrays[name].shape}, not int64 [n]")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Group:
    """What one row becomes: documents that lie in the same pack, as the two ends of a preference do.

    `cost`: the price of its step in units of the caller; None leaves it to the packing. `len(group)`: its tokens.
    """

    documents: tuple[Document, ...]
    cost: float | None = None

    def __len__(self) -> int:
        return sum(len(document) for document in self.documents)


def shifted(wanted: np.ndarray) -> np.ndarray:
    """Labels `[n]` of a document from `wanted` `[n]`, which has the ids that are trained on at their own places.

    >>> shifted(np.array([IGNORE, 5, 6])).tolist()
    [5, 6, -100]
    """
    labels = np.full(len(wanted), IGNORE, np.int64)
    labels[:-1] = wanted[1:]
    return labels


def lay(
    groups: Sequence[Group], *, tokens: int, first: int = 0, leaves: Mapping[str, np.dtype] | None = None
) -> dict[str, Tensor]:
    """One pack: the documents of the groups, one after the other, and padding up to `tokens`.

    Args:
        groups: what lies in the pack; none at all makes a pack of padding.
        tokens: T, the budget of the pack.
        first: the number of the first document. Packs that are joined on one device need numbers of their own: give
            pack i `first = i * tokens`.
        leaves: names and dtypes of further leaves `[n]`, where there may be no document to tell them.

    Returns:
        CPU tensors: tokens, labels, positions (from 0 in each document) and segments (numbers of documents, rising),
        int64 `[T]`, and each further leaf `[T, ...]`. Padding is documents of their own, no longer than the longest
        one, with token 0, labels `IGNORE` and leaves 0.

    Raises:
        ValueError: the documents have more than `tokens` tokens, or differ in their leaves.

    >>> document = Document(np.array([5, 6]), np.array([6, IGNORE]))
    >>> {name: leaf.tolist() for name, leaf in lay([Group((document,))], tokens=3).items()}
    {'tokens': [5, 6, 0], 'labels': [6, -100, -100], 'positions': [0, 1, 0], 'segments': [0, 0, 1]}
    """
    documents = [document for group in groups for document in group.documents]
    lengths = np.array([len(document) for document in documents], np.int64)
    used = int(lengths.sum())
    if used > tokens:
        raise ValueError(f"{len(documents)} documents have {used} tokens, and a pack holds {tokens}")
    numbers, positions = padding(tokens - used, int(lengths.max(initial=1)), len(documents))
    starts = np.cumsum(lengths) - lengths
    arrays = {
        "tokens": _joined([document.tokens for document in documents], tokens, 0, np.dtype(np.int64)),
        "labels": _joined([document.labels for document in documents], tokens, IGNORE, np.dtype(np.int64)),
        "positions": np.concatenate([np.arange(used) - np.repeat(starts, lengths), positions]),
        "segments": np.concatenate([np.repeat(np.arange(len(documents)), lengths), numbers]) + first,
    }
    for name, dtype in _leaves_of(documents, leaves or {}).items():
        arrays[name] = _joined([document.leaves[name] for document in documents], tokens, 0, dtype)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _joined(parts: Sequence[np.ndarray], tokens: int, fill: int, dtype: np.dtype) -> np.ndarray:
    rest = parts[0].shape[1:] if parts else ()
    joined = np.full((tokens, *rest), fill, dtype)
    if parts:
        joined[: sum(len(part) for part in parts)] = np.concatenate(parts)
    return joined


def _leaves_of(documents: Sequence[Document], told: Mapping[str, np.dtype]) -> dict[str, np.dtype]:
    found = dict(told)
    if documents:
        found |= {name: array.dtype for name, array in documents[0].leaves.items()}
    for i, document in enumerate(documents):
        if set(document.leaves) != set(found):
            raise ValueError(f"document {i} of a pack has leaves {sorted(document.leaves)}, others {sorted(found)}")
    return found
