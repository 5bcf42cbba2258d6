"""Documents of text and media, packed into arrays of fixed size: numpy on the CPU, off the training step's path.

A document is a list of parts in reading order. A part of media takes `begin`, one place per token, `end` in the token
stream; the ids under those places are 0 and are overwritten by the encoder's or decoder's rows. Documents lie one
after the other; what remains of the budget is one more document, without labels, so attention never mixes it with the
rest.

Legend: T token budget, N row budget of a modality's features (patches, frames), n its token budget, B target budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftrain.modules.budget import Bound as Bound  # what a budget is made of is imported from here too
from ftrain.modules.budget import Budget, Size, first_fit, needs, total_budget
from ftrain.modules.omni import Decoder, Encoder, OmniModel, Row

IGNORE = -100


@dataclass(frozen=True)
class Text:
    """Token ids; with `train`, each is a label of the token before it (the first of a document has none before it)."""

    ids: Sequence[int] | np.ndarray
    train: bool = False


@dataclass(frozen=True)
class Media:
    """An item that the foundation reads: the arrays that its encoder's `features` name, rows first.

    `order`: where in the item each token that the encoder makes is read, whole numbers from 0 and once each, with 0
    for the first; -1 for one that is not read (of silence behind a recording, say). None: as they come, all of them.
    """

    modality: str
    features: Mapping[str, np.ndarray | Tensor]
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Target:
    """An item that the foundation learns to write: one array of the decoder's `target` shape.

    Its begin token is a label too (choosing to write an image is the model's business), its end token is not (the
    number of codes is known).
    """

    modality: str
    array: np.ndarray | Tensor


Document = Sequence[Text | Media | Target]


class Packed(NamedTuple):
    """`batch` for `omni.loss_terms`; numbers of the documents `taken`, in the order of the pack, and `left`."""

    batch: dict[str, Any]
    taken: list[int]
    left: list[int]


def measure(document: Document, *, model: OmniModel) -> Size:
    """Count a document's tokens, feature rows and targets; ValueError for parts that the model cannot take.

    >>> from ftrain.modules.decoder import preset
    >>> model = OmniModel(preset("llama-tiny"))
    >>> measure([Text([5, 6]), Text([7], train=True)], model=model).tokens
    3
    """
    if not document:
        raise ValueError("a document has no parts")
    tokens, rows, targets, items = 0, dict[str, int](), dict[str, int](), dict[str, list[int]]()
    for part in document:
        match part:
            case Text(ids):
                tokens += len(ids)
            case Media(modality, features):
                count = _check_features(modality, features, model)
                rows[modality] = rows.get(modality, 0) + count
                items.setdefault(modality, []).append(count)
                tokens += 2 + _check_order(part, count // model.encoder(modality).rows_per_token)
            case Target(modality, array):
                decoder = model.decoder(modality)
                _check_array(f"target {modality!r}", array, tuple(array.shape), decoder.target)
                targets[modality] = targets.get(modality, 0) + 1
                tokens += 2 + decoder.codes_per_target
    return Size(tokens, rows, targets, items)


def _check_features(modality: str, features: Mapping[str, np.ndarray | Tensor], model: OmniModel) -> int:
    """The number of rows of an item, after checking names, shapes and whole tokens."""
    encoder = model.encoder(modality)
    if set(features) != set(encoder.features):
        raise ValueError(f"{modality!r} takes features {sorted(encoder.features)}, got {sorted(features)}")
    counts = {name: array.shape[0] for name, array in features.items()}
    rows = next(iter(counts.values()))
    if len(set(counts.values())) != 1:
        raise ValueError(f"features of one {modality!r} item differ in rows: {counts}")
    for name, array in features.items():
        _check_array(f"feature {modality}.{name}", array, tuple(array.shape[1:]), encoder.features[name])
    if rows == 0 or rows % encoder.rows_per_token:
        raise ValueError(f"a {modality!r} item has {rows} rows: not a positive multiple of {encoder.rows_per_token}")
    return rows


def _check_order(part: Media, made: int) -> int:
    """How many tokens of an item are read, of so many that are made, after checking their order."""
    if part.order is None:
        return made
    order_n = np.asarray(part.order)
    read = np.sort(order_n[order_n >= 0])
    if order_n.shape != (made,) or order_n[0] != 0 or (read != np.arange(len(read))).any():
        raise ValueError(
            f"a {part.modality!r} item of {made} tokens has the order {order_n.tolist()}: give each its place, the "
            "first 0, no number twice and none left out, and -1 to those that are not read"
        )
    return len(read)


def _check_array(what: str, array: np.ndarray | Tensor, shape: tuple[int, ...], row: Row) -> None:
    """ValueError for rows of another shape, and for whole numbers in the place of others, or the reverse."""
    if shape != tuple(row.shape):
        raise ValueError(f"{what} has shape {list(shape)}, the model takes {list(row.shape)}")
    floating = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if floating != (np.dtype(row.dtype).kind == "f"):
        raise ValueError(f"{what} is of {array.dtype}, the model takes {row.dtype}: bring it into the model's range")


def _ids(part: Text) -> np.ndarray:
    ids = np.asarray(part.ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"token ids of {ids.dtype}: give whole numbers")
    return ids


def exact_budget(documents: Sequence[Document], *, model: OmniModel) -> Budget:
    """The smallest budget that holds all of the documents.

    ValueError as in `measure`.

    >>> from ftrain.modules.decoder import preset
    >>> model = OmniModel(preset("llama-tiny"))
    >>> exact_budget([[Text([5, 6])], [Text([7])]], model=model).tokens
    3
    """
    return total_budget([measure(document, model=model) for document in documents])


def pack(documents: Sequence[Document], *, budget: Budget, model: OmniModel, absent: str = "drop") -> Packed:
    """Take the documents that fit, first fit in the given order, and lay them out (`lay`); the others are `left`.

    ValueError for a document that alone exceeds the budget, and for a budget that is not whole tokens.

    >>> from ftrain.modules.decoder import preset
    >>> model = OmniModel(preset("llama-tiny"))
    >>> documents = [[Text([5, 6, 7], train=True)], [Text([8] * 9)], [Text([9])]]
    >>> packed = pack(documents, budget=Budget(10), model=model)
    >>> packed.taken, packed.left
    ([0, 2], [1])
    >>> packed.batch["labels_T"].tolist()
    [6, 7, -100, -100, -100, -100, -100, -100, -100, -100]
    """
    if not documents:
        raise ValueError("there are no documents to pack")
    taken, left = first_fit(needs([measure(document, model=model) for document in documents], budget))
    batch, order = lay([documents[i] for i in taken], budget=budget, model=model, absent=absent)
    return Packed(batch, [taken[i] for i in order], left)


def lay(
    documents: Sequence[Document], *, budget: Budget, model: OmniModel, absent: str = "drop"
) -> tuple[dict[str, Any], list[int]]:
    """Lay out documents that fit, the longest first, in arrays of the budget's sizes: the batch, and the order in it.

    The batch holds, as CPU tensors: `tokens_T`, `labels_T` (the target *for* position t, -100 for none), `positions_T`
    (from 0 in each document), all int64, `segments_T` (`Documents`, document numbers as ids), `valid_T` (bool, False on
    padding); `encoders.<name>`: `features` (the items' arrays joined, padded with zeros, and `segments_N`, `Documents`
    of the items) and `index_n` (the place of each token in the stream, T for padding); `decoders.<name>`: `target`
    `[B, ...]` and `index_n` (the place of each code).

    A modality that no document has is left out of the batch (`absent="drop"`), or is there as padding, so that the tree
    of arrays never changes (`absent="pad"`); one for which the budget has no room is never there. Without documents all
    is padding.

    Raises:
        ValueError: `absent` is neither; the documents do not fit; a document has a modality that the model has not, or
            media of other shapes than its encoder takes.
    """
    if absent not in ("drop", "pad"):
        raise ValueError(f"absent={absent!r} is not 'drop' or 'pad'")
    sizes = [measure(document, model=model) for document in documents]
    needs(sizes, budget)
    order = sorted(range(len(documents)), key=lambda i: -sizes[i].tokens)
    batch, media, targets = _lay_tokens([documents[i] for i in order], budget, model)
    pad = absent == "pad"
    batch["encoders"] = {
        name: _join_media(media.get(name, []), model.encoder(name), name, budget)
        for name, rows in budget.rows.items()
        if rows and (pad or name in media)
    }
    batch["decoders"] = {
        name: _join_targets(targets.get(name, []), model.decoder(name), budget=count, end=budget.tokens)
        for name, count in budget.targets.items()
        if count and (pad or name in targets)
    }
    return batch, order


class _Placed(NamedTuple):
    """A part of media with the place of its first row in the stream."""

    part: Media | Target
    place: int


_Found = dict[str, list[_Placed]]


def _lay_tokens(
    documents: Sequence[Document], budget: Budget, model: OmniModel
) -> tuple[dict[str, Any], _Found, _Found]:
    """The token arrays of the stream, and which media and targets belong where in it."""
    T = budget.tokens
    tokens_T = np.zeros(T, np.int64)
    wanted_T = np.full(T, IGNORE, np.int64)  # the ids that are labels, at their own places
    segments_T, positions_T = np.empty((2, T), np.int64)
    media, targets, cursor, longest = _Found(), _Found(), 0, 0
    for number, document in enumerate(documents):
        start = cursor
        for part in document:
            begin = cursor
            if isinstance(part, Text):
                ids = _ids(part)
                cursor += len(ids)
                tokens_T[begin:cursor] = ids
                if part.train:
                    wanted_T[begin:cursor] = ids
                continue
            opening, closing, rows = _surround(part, model)
            cursor += rows + 2
            tokens_T[begin], tokens_T[cursor - 1] = opening, closing
            if isinstance(part, Target):
                wanted_T[begin] = opening
            found = media if isinstance(part, Media) else targets
            found.setdefault(part.modality, []).append(_Placed(part, begin + 1))
        segments_T[start:cursor] = number
        positions_T[start:cursor] = np.arange(cursor - start)
        longest = max(longest, cursor - start)
    places = budget.places("tokens", T)
    segments_T[cursor:], positions_T[cursor:] = padding(T - cursor, longest, len(documents), places)
    _check_ids(tokens_T, segments_T, model.foundation.vocab)
    arrays = {
        "tokens_T": tokens_T,
        "labels_T": _shift(wanted_T, segments_T),
        "positions_T": positions_T,
        "valid_T": segments_T < len(documents),
    }
    batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**batch, "segments_T": budget.documents("tokens", segments_T)}, media, targets


def padding(count: int, longest: int, first: int, places: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers, from `first`, and positions of `count` rows of padding: in documents of `longest` rows, or of
    more where they would else, with the `first` ones, be more than `places`."""
    free = max(1, count if places is None else places - first)
    length = max(1, longest, -(-count // free))
    rows = np.arange(count)
    return first + rows // length, rows % length


def _shift(wanted_T: np.ndarray, segments_T: np.ndarray) -> np.ndarray:
    """Labels: what the next position of the same document holds."""
    labels_T = np.full_like(wanted_T, IGNORE)
    labels_T[:-1] = np.where(segments_T[1:] == segments_T[:-1], wanted_T[1:], IGNORE)
    return labels_T


def _surround(part: Media | Target, model: OmniModel) -> tuple[int, int, int]:
    """The ids before and after a part of media, and the number of rows between them."""
    if isinstance(part, Target):
        decoder = model.decoder(part.modality)
        return decoder.begin, decoder.end, decoder.codes_per_target
    encoder = model.encoder(part.modality)
    made = next(iter(part.features.values())).shape[0] // encoder.rows_per_token
    return encoder.begin, encoder.end, made if part.order is None else int(np.max(part.order)) + 1


def _check_ids(tokens_T: np.ndarray, segments_T: np.ndarray, vocab: int) -> None:
    bad = np.flatnonzero((tokens_T < 0) | (tokens_T >= vocab))
    if bad.size:
        where, document = int(bad[0]), int(segments_T[bad[0]])
        place = where - int(np.searchsorted(segments_T, document))
        raise ValueError(
            f"token id {int(tokens_T[where])} at place {place} of packed document {document} is outside [0, {vocab})"
        )


def _join_media(found: Sequence[_Placed], encoder: Encoder, name: str, budget: Budget) -> dict[str, Any]:
    """One encoder's part of the batch: joined features, the items' documents, places of tokens."""
    N, per_token = budget.rows[name], encoder.rows_per_token
    if N % per_token:
        raise ValueError(f"a budget of {N} rows is not a multiple of the encoder's {per_token} rows per token")
    features: dict[str, Any] = {
        key: _join([item.part.features[key] for item in found], row, N)  # type: ignore[union-attr]
        for key, row in encoder.features.items()
    }
    counts = [next(iter(item.part.features.values())).shape[0] for item in found]  # type: ignore[union-attr]
    rest, _ = padding(N - sum(counts), longest_item(counts, name, budget), len(found), budget.places(name, N))
    segments_N = np.concatenate([np.repeat(np.arange(len(found)), counts), rest])
    features["segments_N"] = budget.documents(name, segments_N)
    places = [
        _read_at(item, count // per_token, nowhere=budget.tokens) for item, count in zip(found, counts, strict=True)
    ]
    return {"features": features, "index_n": _index(places, N // per_token, budget.tokens)}


def _read_at(item: _Placed, made: int, *, nowhere: int) -> np.ndarray:
    """The place in the stream of each token that is made of an item."""
    order_n = item.part.order  # type: ignore[union-attr]
    if order_n is None:
        return np.arange(item.place, item.place + made)
    return np.where(order_n < 0, nowhere, item.place + order_n)


def longest_item(counts: Sequence[int], name: str, budget: Budget, size: int | None = None) -> int:
    """How many rows an item of padding has: those of the longest item; without any, of the longest that there may be,
    or all of `size` rows (None: of the budget)."""
    bound = budget.bounds.get(name)
    allowed = None if bound is None else bound.longest
    return max(counts, default=allowed or size or budget.rows[name])


def _join_targets(found: Sequence[_Placed], decoder: Decoder, *, budget: int, end: int) -> dict[str, Any]:
    """One decoder's part of the batch: stacked targets and places of their codes."""
    target = _join([np.asarray(item.part.array)[None] for item in found], decoder.target, budget)  # type: ignore[union-attr]
    places = [np.arange(item.place, item.place + decoder.codes_per_target) for item in found]
    return {"target": target, "index_n": _index(places, budget * decoder.codes_per_target, end)}


def _join(arrays: Sequence[np.ndarray | Tensor], row: Row, budget: int) -> Tensor:
    """Arrays joined along their first dim into `[budget, ...]`, zeros behind."""
    out = np.zeros((budget, *row.shape), row.dtype)
    cursor = 0
    for array in arrays:
        out[cursor : cursor + len(array)] = array
        cursor += len(array)
    return torch.from_numpy(out)


def _index(places: Sequence[np.ndarray], size: int, end: int) -> Tensor:
    """The places of items as one index of `size`, filled up with `end`, which drops a row."""
    found_n = np.concatenate([*places, np.zeros(0, np.int64)])
    return torch.from_numpy(np.concatenate([found_n, np.full(size - len(found_n), end)]).astype(np.int64))
