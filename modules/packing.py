"""Documents of text and media, packed into arrays of fixed size: numpy on the CPU, off the training step's path.

A document is a list of parts in reading order. A part of media takes `begin`, one place per token, `end` in the token
stream; the ids under those places are 0 and are overwritten by the encoder's or decoder's rows. Documents lie one
after the other; what remains of the budget is one more document, without labels, so attention never mixes it with the
rest.

Legend: T token budget, N row budget of a modality's features (patches, frames), n its token budget, B target budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.documents import Documents
from modules.omni import Decoder, Encoder, OmniModel, Row

IGNORE = -100


@dataclass(frozen=True)
class Text:
    """Token ids; with `train`, each is a label of the token before it (the first of a document has none before it)."""

    ids: Sequence[int] | np.ndarray
    train: bool = False


@dataclass(frozen=True)
class Media:
    """An item that the foundation reads: the arrays that its encoder's `features` name, rows first."""

    modality: str
    features: Mapping[str, np.ndarray | Tensor]


@dataclass(frozen=True)
class Target:
    """An item that the foundation learns to write: one array of the decoder's `target` shape.

    Its begin token is a label too (choosing to write an image is the model's business), its end token is not (the
    number of codes is known).
    """

    modality: str
    array: np.ndarray | Tensor


Document = Sequence[Text | Media | Target]


class Bound(NamedTuple):
    """At most `most` documents (or items of media) in a pack, of at most `longest` tokens (or rows); None: any."""

    most: int
    longest: int | None = None


@dataclass(frozen=True)
class Budget:
    """Sizes of the packed arrays: `tokens`, feature `rows` per encoder, `targets` per decoder.

    `bounds`, by "tokens" or an encoder's name: how many documents a pack takes, and how long they may be. They are
    sizes of arrays and grids too, so a run that sets them is traced once and its kernels do no empty work. Without them
    a pack takes any number, and the arrays grow by powers of two.
    """

    tokens: int
    rows: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, Bound] = field(default_factory=dict)

    def places(self, stream: str, size: int) -> int | None:
        """How many documents the offsets of `size` tokens (or rows) have room for, padding included; None: any."""
        bound = self.bounds.get(stream)
        if bound is None:
            return None
        return bound.most + (1 if bound.longest is None else size // bound.longest + 1)

    def documents(self, stream: str, ids_N: np.ndarray, *, packs: int = 1) -> Documents:
        """The documents of these ids, in `packs` equal packs."""
        bound = self.bounds.get(stream)
        return Documents.of(
            torch.from_numpy(ids_N),
            max_documents=self.places(stream, len(ids_N) // packs),
            longest=None if bound is None else bound.longest,
            packs=packs,
        )


class Size(NamedTuple):
    """What a document takes of each budget; `items`: the rows of each item of media, by encoder."""

    tokens: int
    rows: dict[str, int]
    targets: dict[str, int]
    items: dict[str, list[int]]


class Packed(NamedTuple):
    """`batch` for `omni.loss_terms`; numbers of the documents `taken`, in the order of the pack, and `left`."""

    batch: dict[str, Any]
    taken: list[int]
    left: list[int]


def measure(document: Document, *, model: OmniModel) -> Size:
    """Count a document's tokens, feature rows and targets; ValueError for parts that the model cannot take."""
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
                tokens += 2 + count // model.encoder(modality).rows_per_token
            case Target(modality, array):
                decoder = model.decoder(modality)
                _check_shape(f"target {modality!r}", tuple(array.shape), decoder.target)
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
        _check_shape(f"feature {modality}.{name}", tuple(array.shape[1:]), encoder.features[name])
    if rows == 0 or rows % encoder.rows_per_token:
        raise ValueError(f"a {modality!r} item has {rows} rows: not a positive multiple of {encoder.rows_per_token}")
    return rows


def _check_shape(what: str, shape: tuple[int, ...], row: Row) -> None:
    if shape != tuple(row.shape):
        raise ValueError(f"{what} has shape {list(shape)}, the model takes {list(row.shape)}")


def exact_budget(documents: Sequence[Document], *, model: OmniModel) -> Budget:
    """The smallest budget that holds all of the documents."""
    sizes = [measure(document, model=model) for document in documents]
    return Budget(
        tokens=sum(size.tokens for size in sizes),
        rows=_total([size.rows for size in sizes]),
        targets=_total([size.targets for size in sizes]),
        bounds={"tokens": Bound(len(sizes)), **{name: Bound(count) for name, count in _counts(sizes).items()}},
    )


def _counts(sizes: Sequence[Size]) -> Mapping[str, int]:
    return _total([{name: len(rows) for name, rows in size.items.items()} for size in sizes])


def _total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(c.get(name, 0) for c in counts) for name in dict.fromkeys(n for c in counts for n in c)}


def pack(documents: Sequence[Document], *, budget: Budget, model: OmniModel, absent: str = "drop") -> Packed:
    """Take the documents that fit, first fit in the given order, and lay them out by length in arrays of the budget's
    sizes.

    The batch holds, as CPU tensors: `tokens_T`, `labels_T` (the target *for* position t, -100 for none), `positions_T`
    (from 0 in each document), all int64, `segments_T` (`Documents`, document numbers as ids), `valid_T` (bool, False on
    padding); `encoders.<name>`: `features` (the items' arrays joined, padded with zeros, and `segments_N`, `Documents`
    of the items) and `index_n` (the place of each token in the stream, T for padding); `decoders.<name>`: `target`
    `[B, ...]` and `index_n` (the place of each code).

    A modality of which no document was taken is left out of the batch (`absent="drop"`), or is there as padding, so
    that the tree of arrays never changes (`absent="pad"`). ValueError for a document that alone exceeds the budget.
    """
    if absent not in ("drop", "pad"):
        raise ValueError(f"absent={absent!r} is not 'drop' or 'pad'")
    if not documents:
        raise ValueError("there are no documents to pack")
    sizes = [measure(document, model=model) for document in documents]
    taken, left = _first_fit(sizes, budget)
    taken.sort(key=lambda i: -sizes[i].tokens)
    batch, media, targets = _lay_tokens([documents[i] for i in taken], budget, model)
    pad = absent == "pad"
    batch["encoders"] = {
        name: _join_media(media.get(name, []), model.encoder(name), name, budget)
        for name in budget.rows
        if pad or name in media
    }
    batch["decoders"] = {
        name: _join_targets(targets.get(name, []), model.decoder(name), budget=count, end=budget.tokens)
        for name, count in budget.targets.items()
        if pad or name in targets
    }
    return Packed(batch, taken, left)


def _first_fit(sizes: Sequence[Size], budget: Budget) -> tuple[list[int], list[int]]:
    """Which documents fit beside those already taken, and which are left."""
    limits = _limits(budget)
    taken, left, free = [], [], dict(limits)
    for i, size in enumerate(sizes):
        _check_lengths(i, size, budget)
        wanted = _wanted(size, budget)
        over = [what for what, n in wanted.items() if n > limits.get(what, 0)]
        if over:
            words = ", ".join(f"{wanted[what]} {what} (the budget holds {limits.get(what, 0)})" for what in over)
            raise ValueError(f"document {i} needs {words}: give a larger budget or leave the document out")
        if any(n > free[what] for what, n in wanted.items()):
            left.append(i)
            continue
        taken.append(i)
        for what, n in wanted.items():
            free[what] -= n
    return taken, left


def _limits(budget: Budget) -> dict[str, int]:
    """A budget as one dictionary, keyed by the words of an error."""
    flat = {"tokens": budget.tokens}
    flat.update((f"{name} rows", count) for name, count in budget.rows.items())
    flat.update((f"{name} targets", count) for name, count in budget.targets.items())
    flat.update((_number_of(stream), bound.most) for stream, bound in budget.bounds.items())
    return flat


def _wanted(size: Size, budget: Budget) -> dict[str, int]:
    """What a document takes, keyed likewise; numbers of documents and items only where they are bounded."""
    flat = {"tokens": size.tokens}
    flat.update((f"{name} rows", count) for name, count in size.rows.items())
    flat.update((f"{name} targets", count) for name, count in size.targets.items())
    numbers = {"tokens": 1, **{name: len(rows) for name, rows in size.items.items()}}
    flat.update((_number_of(stream), n) for stream, n in numbers.items() if stream in budget.bounds)
    return flat


def _number_of(stream: str) -> str:
    return "documents" if stream == "tokens" else f"{stream} items"


def _check_lengths(number: int, size: Size, budget: Budget) -> None:
    for stream, lengths in {"tokens": [size.tokens], **size.items}.items():
        bound = budget.bounds.get(stream)
        if bound is not None and bound.longest is not None and max(lengths) > bound.longest:
            what = "tokens" if stream == "tokens" else f"{stream} rows in one item"
            raise ValueError(
                f"document {number} has {max(lengths)} {what}, more than the budget's longest, {bound.longest}: raise "
                f"bounds[{stream!r}], or leave the document out"
            )


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
                cursor += len(part.ids)
                tokens_T[begin:cursor] = part.ids
                if part.train:
                    wanted_T[begin:cursor] = part.ids
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
    rows = next(iter(part.features.values())).shape[0] // encoder.rows_per_token
    return encoder.begin, encoder.end, rows


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
    runs = [(item.place, count // per_token) for item, count in zip(found, counts, strict=True)]
    return {"features": features, "index_n": _index(runs, N // per_token, budget.tokens)}


def longest_item(counts: Sequence[int], name: str, budget: Budget, size: int | None = None) -> int:
    """How many rows an item of padding has: those of the longest item; without any, of the longest that there may be,
    or all of `size` rows (None: of the budget)."""
    bound = budget.bounds.get(name)
    allowed = None if bound is None else bound.longest
    return max(counts, default=allowed or size or budget.rows[name])


def _join_targets(found: Sequence[_Placed], decoder: Decoder, *, budget: int, end: int) -> dict[str, Any]:
    """One decoder's part of the batch: stacked targets and places of their codes."""
    target = _join([np.asarray(item.part.array)[None] for item in found], decoder.target, budget)  # type: ignore[union-attr]
    places = [(item.place, decoder.codes_per_target) for item in found]
    return {"target": target, "index_n": _index(places, budget * decoder.codes_per_target, end)}


def _join(arrays: Sequence[np.ndarray | Tensor], row: Row, budget: int) -> Tensor:
    """Arrays joined along their first dim into `[budget, ...]`, zeros behind."""
    out = np.zeros((budget, *row.shape), row.dtype)
    cursor = 0
    for array in arrays:
        out[cursor : cursor + len(array)] = array
        cursor += len(array)
    return torch.from_numpy(out)


def _index(places: Sequence[tuple[int, int]], size: int, end: int) -> Tensor:
    """`(place, count)` runs as one index of `size`, filled up with `end`, which drops a row."""
    index_n = np.full(size, end, np.int64)
    cursor = 0
    for place, count in places:
        index_n[cursor : cursor + count] = np.arange(place, place + count)
        cursor += count
    return torch.from_numpy(index_n)
