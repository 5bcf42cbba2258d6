"""How the documents of a step lie in its batch: in packs of tokens, or as rows of their own, with their media.

Legend: N groups of the buffer, T tokens of a pack, P packs of a step, B rows, L tokens of a row, K kinds of media.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ftrain.data.documents import IGNORE, Document, Group, lay
from ftrain.data.even_packs import even_plan
from ftrain.data.packing import Packing, Plan, Shape, plan_packs
from ftrain.data.row_plan import RowGroup, plan_rows, rounded, shape_of
from ftrain.kernels.documents import Documents
from ftrain.modules.packs import join_packs

Arrays = Mapping[str, np.ndarray]
"""Arrays of media by the names of a model's leaves."""


@dataclass(frozen=True)
class Stream:
    """One kind of media as a model has it among its tokens.

    - `token`: the id that stands for a place of such media.
    - `unit`: tokens of the smallest piece.
    - `fill(tokens)`: media of so many tokens, a multiple of `unit`, that stand for nothing: what fills up a row behind
      its document, where no token that is trained on sees it.
    - `heard`: it is sound, of which packs have room in chunks.
    - `quadratic`: what an encoder computes for n tokens that stand side by side is `n + quadratic * n**2`, where a
      token without the others is one.
    - `piece`: the most tokens of what an encoder reads as a whole, where several such pieces stand side by side (frames
      of a film); None: what stands side by side is one.
    """

    token: int
    unit: int
    fill: Callable[[int], Arrays]
    heard: bool = False
    quadratic: float = 0.0
    piece: int | None = None

    def seen(self, tokens_n: np.ndarray) -> tuple[float, int]:
        """Of a document of these tokens, int64 `[n]`: what an encoder computes for its media, and a bound of the tokens
        of a piece of them.
        """
        at_n = np.flatnonzero(tokens_n == self.token)
        lengths = np.diff(np.flatnonzero(np.diff(at_n, prepend=-2, append=-2) != 1))
        cost, longest = float((lengths + self.quadratic * lengths.astype(np.float64) ** 2).sum()), 0
        if len(lengths):
            longest = int(lengths.max()) if self.piece is None else min(self.piece, int(lengths.max()))
        return cost, longest


class Sized(Protocol):
    """A group that waits: `lengths` of its documents, and `group(tokens)`, the documents."""

    @property
    def lengths(self) -> np.ndarray:
        """Int64 `[n]`."""

    def group(self, tokens: int) -> Group:
        """The documents, or a piece of at most so many tokens of one that is cut."""


class Layout(Protocol):
    """Which groups make the next step, and the batch that they are."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Kinds of media that the model reads."""

    def sizes(self, waiting: Sized, packing: Packing) -> RowGroup:
        """What `plan` knows of a group."""

    def shape(self, sizes: RowGroup, packing: Packing) -> Shape:
        """Of the packs of a step whose oldest group is this one."""

    def plan(self, sizes: Sequence[RowGroup], costs_N: np.ndarray, waited_N: np.ndarray, packing: Packing) -> Plan:
        """The packs of the next step, as `plan_packs`; `sizes` of the groups."""

    def batch(
        self, packs: Sequence[Sequence[Group]], plan: Plan, *, slots: int, leaves: Mapping[str, np.dtype] | None
    ) -> dict[str, Any]:
        """The batch of these packs, which are all of the plan's shape. `slots`: documents for which each has room."""


@dataclass(frozen=True)
class PackLayout:
    """Documents one after the other in packs `[T]`, told apart by `segments`.

    `streams`: kinds of media that the model reads, of which all packs of a step have room for as many places (a leaf's
    rows are then those of one pack after the other), and about as much to encode (`ftrain.data.even_packs`).
    `ready(batch, places, packs)`: what the model makes of so many packs with media before a step; `places`: tokens of
    each kind of media for which it makes room in each. `parts`: ranks that share a pack, each of which encodes pieces
    of its own; there is then room for these however they come.
    """

    streams: tuple[Stream, ...] = ()
    ready: Callable[[dict[str, Any], tuple[int, ...], int], dict[str, Any]] | None = None
    parts: int = 1

    def sizes(self, waiting: Sized, packing: Packing) -> RowGroup:
        """All tokens, and those of media of all its documents together."""
        tokens = int(waiting.lengths.sum())
        if not self.streams:
            return RowGroup(tokens, tokens, (), len(waiting.lengths))
        documents = waiting.group(packing.tokens).documents
        media = tuple(sum(n) for n in zip(*(_places(d, self.streams) for d in documents), strict=True))
        seen = [stream.seen(document.tokens) for document in documents for stream in self.streams]
        cost, longest = sum(cost for cost, _ in seen), max(longest for _, longest in seen)
        return RowGroup(tokens, tokens - sum(media), media, len(documents), cost, longest)

    def shape(self, sizes: RowGroup, packing: Packing) -> Shape:
        """The budget of tokens, whatever the group."""
        del sizes
        return Shape(packing.tokens)

    def plan(self, sizes: Sequence[RowGroup], costs_N: np.ndarray, waited_N: np.ndarray, packing: Packing) -> Plan:
        """As `plan_packs`, and even in what encoders compute. All packs of a step have room for the media of the one
        that has most.
        """
        lengths_N = np.array([group.tokens for group in sizes], np.int64)
        plan = plan_packs(
            lengths_N,
            costs_N,
            waited_N=waited_N,
            tokens=packing.tokens,
            packs=packing.packs,
            patience=packing.patience,
            tolerance=packing.tolerance,
        )
        if not self.streams:
            return plan
        seen_N = np.array([group.seen for group in sizes])
        plan = even_plan(plan, lengths_N, np.stack([costs_N, seen_N], 1), waited_N >= packing.patience)
        media_NK = np.array([group.media for group in sizes], np.int64).reshape(len(sizes), len(self.streams))
        most_K = [media_NK[plan.pack_N == pack].sum(0) for pack in range(packing.packs)]
        media = tuple(
            rounded(int(n), stream.unit) for n, stream in zip(np.max(most_K, axis=0), self.streams, strict=True)
        )
        if self.parts > 1:
            longest = max(
                (g.longest for g, pack in zip(sizes, plan.pack_N.tolist(), strict=True) if pack >= 0), default=0
            )
            media = (self._room(sum(media), rounded(longest)) - sum(media[1:]), *media[1:])
        return plan._replace(shape=plan.shape._replace(media=media))

    def _room(self, tokens: int, longest: int) -> int:
        """In how many places of equal parts so many tokens fit, in pieces of at most `longest`, each whole in a part:
        the longest first, each to the emptiest part, fill no part above an equal share and a piece.
        """
        return self.parts * max(1, -(-tokens // self.parts) + longest)

    def batch(
        self, packs: Sequence[Sequence[Group]], plan: Plan, *, slots: int, leaves: Mapping[str, np.dtype] | None
    ) -> dict[str, Any]:
        """Packs one after the other; ids of documents as `Documents`."""
        laid = [self._laid(groups, plan, slots, leaves) for groups in packs]
        batch = laid[0] if len(laid) == 1 else join_packs(laid)
        if self.ready is None:
            return batch
        batch |= joined([document.media for groups in packs for group in groups for document in group.documents])
        return self.ready(batch, plan.shape.media, len(packs))

    def _laid(
        self, groups: Sequence[Group], plan: Plan, slots: int, leaves: Mapping[str, np.dtype] | None
    ) -> dict[str, Any]:
        pack: dict[str, Any] = dict(lay(groups, tokens=plan.shape.length, leaves=leaves))
        ids_T = pack["segments"]
        most = int(ids_T.max()) + 1  # above `slots` only where groups were left out and much padding is in their place
        pack["segments"] = Documents.of(ids_T, max_documents=slots if most <= slots else None)
        return pack


@dataclass(frozen=True)
class RowLayout:
    """Documents as rows `[B, L]` of their own, for models whose documents cannot share a pack.

    A row ends in padding: token 0 without a label, then tokens and media that fill it up, so that all rows have equally
    many of each kind. `streams`: kinds of media that the model reads. `ready(batch)`: what it makes of them before a
    step (`Model.media`).
    """

    streams: tuple[Stream, ...] = ()
    ready: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def sizes(self, waiting: Sized, packing: Packing) -> RowGroup:
        """Of its longest document, and of the one with most media of a kind."""
        lengths, tokens = waiting.lengths, int(waiting.lengths.sum())
        if not self.streams:
            return RowGroup(tokens, int(lengths.max()), (), len(lengths))
        found = [_places(document, self.streams) for document in waiting.group(packing.tokens).documents]
        text = max(int(n) - sum(media) for n, media in zip(lengths, found, strict=True))
        return RowGroup(tokens, text, tuple(max(of) for of in zip(*found, strict=True)), len(lengths))

    def shape(self, sizes: RowGroup, packing: Packing) -> Shape:
        """As `shape_of`."""
        return shape_of(sizes, tokens=packing.tokens, units=[stream.unit for stream in self.streams])

    def plan(self, sizes: Sequence[RowGroup], costs_N: np.ndarray, waited_N: np.ndarray, packing: Packing) -> Plan:
        """As `plan_rows`: all rows cost alike, as all are filled up."""
        return plan_rows(sizes, tokens=packing.tokens, packs=packing.packs, units=[s.unit for s in self.streams])

    def batch(
        self, packs: Sequence[Sequence[Group]], plan: Plan, *, slots: int, leaves: Mapping[str, np.dtype] | None
    ) -> dict[str, Any]:
        """The rows of one pack after the other; a pack without enough documents has rows of padding."""
        shape, rows = plan.shape, list[Document | None]()
        for groups in packs:
            own: list[Document | None] = [document for group in groups for document in group.documents]
            rows += own + [None] * (shape.rows - len(own))
        tokens_BL = np.zeros((len(rows), shape.length), np.int64)
        labels_BL = np.full((len(rows), shape.length), IGNORE, np.int64)
        media: list[Arrays] = []
        for row, document in enumerate(rows):
            if document is not None:
                tokens_BL[row, : len(document)] = document.tokens
                labels_BL[row, : len(document)] = document.labels
                media.append(document.media)
            media += self._filled(tokens_BL[row], document, shape.media)
        batch: dict[str, Any] = {"tokens": torch.from_numpy(tokens_BL), "labels": torch.from_numpy(labels_BL)}
        batch |= _further(rows, shape.length, leaves or {})
        batch |= joined(media)
        return batch if self.ready is None else self.ready(batch)

    def _filled(self, tokens_L: np.ndarray, document: Document | None, places: Sequence[int]) -> list[Arrays]:
        """Write tokens of media to the end of a row, as many as it lacks; and the media."""
        end, made = len(tokens_L), list[Arrays]()
        for stream, most in zip(self.streams, places, strict=True):
            lacking = most - (_count(document, stream) if document is not None else 0)
            if lacking:
                tokens_L[end - lacking : end] = stream.token
                end -= lacking
                made.append(stream.fill(lacking))
        return made


def joined(media: Sequence[Arrays]) -> dict[str, torch.Tensor]:
    """The arrays of several documents, one after the other: tensors `[rows, ...]` by name; not all need have all."""
    names = dict.fromkeys(name for arrays in media for name in arrays)
    return {name: torch.from_numpy(np.concatenate([a[name] for a in media if name in a])) for name in names}


def _places(document: Document, streams: Sequence[Stream]) -> tuple[int, ...]:
    return tuple(_count(document, stream) for stream in streams)


def _count(document: Document, stream: Stream) -> int:
    return int((document.tokens == stream.token).sum())


def _further(rows: Sequence[Document | None], length: int, told: Mapping[str, np.dtype]) -> dict[str, torch.Tensor]:
    """Further leaves of the documents as rows `[B, L, ...]`, 0 in padding."""
    kinds = {name: (np.dtype(dtype), ()) for name, dtype in told.items()}
    for document in rows:
        kinds |= {} if document is None else {n: (a.dtype, a.shape[1:]) for n, a in document.leaves.items()}
    found = {name: np.zeros((len(rows), length, *rest), dtype) for name, (dtype, rest) in kinds.items()}
    for row, document in enumerate(rows):
        if document is not None:
            for name, array in document.leaves.items():
                found[name][row, : len(document)] = array
    return {name: torch.from_numpy(array) for name, array in found.items()}
