"""Groups that were read and wait for their pack, the oldest first."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftrain.data.cost import CostOf
from ftrain.data.documents import Document, Group
from ftrain.data.encoding_ahead import Drawn
from ftrain.data.layout import Layout
from ftrain.data.packing import Packing, Plan
from ftrain.data.rejects import BadRow
from ftrain.data.row_plan import RowGroup

TOO_LONG = "longer than a pack"
"""The kind of `BadRow` that says so."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A group or, of a document that is cut, piece number `piece`; `lengths`: of its documents, int64 `[n]`.

    `since`: the steps that were made before it was read.
    """

    drawn: Drawn
    lengths: np.ndarray
    piece: int
    since: int
    cost: float | None

    def group(self, tokens: int) -> Group:
        """Its documents; pieces have `tokens` tokens, and the last one what is left."""
        group = self.drawn.group()
        if len(self.drawn.lengths) > 1 or len(group) <= tokens:
            return group
        (document,), start = group.documents, self.piece * tokens
        end = start + tokens
        leaves = {name: array[start:end] for name, array in document.leaves.items()}
        return Group((Document(document.tokens[start:end], document.labels[start:end], leaves),), self.cost)


def pieces(found: Drawn, packing: Packing, *, since: int) -> list[Waiting]:
    """What of an encoded row waits: its group, or with `cut="split"` the pieces of a document longer than a pack.

    A piece knows nothing of the tokens before it; the label of its last token is the first token of the next piece.
    BadRow for a row that was rejected, and for a group that is longer than a pack and may not be cut.
    """
    if found.rejected is not None:
        raise found.rejected
    total, tokens = int(found.lengths.sum()), packing.tokens
    if total <= tokens:
        return [Waiting(found, found.lengths, 0, since, found.cost)]
    if packing.cut == "split" and len(found.lengths) == 1 and not _has_media(found.group().documents[0]):
        lengths = [min(tokens, total - start) for start in range(0, total, tokens)]
        costs = [None if found.cost is None else found.cost * length / total for length in lengths]
        return [Waiting(found, np.array([n]), i, since, c) for i, (n, c) in enumerate(zip(lengths, costs, strict=True))]
    several = f" in {len(found.lengths)} documents that belong together" if len(found.lengths) > 1 else ""
    raise BadRow(found.where, TOO_LONG, f"it has {total} tokens{several}, and a pack {tokens}")


def _has_media(document: Document) -> bool:
    return bool(document.parts or document.media)


class Buffer:
    """Groups that wait, the oldest first. `tokens`: of all of them."""

    def __init__(self, packing: Packing, layout: Layout) -> None:
        self._packing, self._layout = packing, layout
        self._waiting: list[Waiting] = []
        self._sizes: list[RowGroup] = []
        self._costs = np.zeros(0)  # of the first ones; those that came since have none yet
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest(self) -> int:
        """The place of the oldest group."""
        return self._waiting[0].drawn.place

    @property
    def held(self) -> np.ndarray:
        """Int64 `[n, 3]`, as `Position.held`."""
        rows = [(w.drawn.place, w.piece, w.since) for w in self._waiting]
        return np.array(rows, np.int64).reshape(len(rows), 3)

    def add(self, waiting: Waiting) -> None:
        """Put a group behind all others."""
        sizes = self._layout.sizes(waiting, self._packing)
        self._waiting.append(waiting)
        self._sizes.append(sizes)
        self.tokens += sizes.tokens

    def take(self, *, step: int) -> tuple[list[list[Waiting]], Plan]:
        """What each pack of the step after `step` others has, which leaves the buffer, and the plan of the step."""
        packing, waiting = self._packing, self._waiting
        self._costs = np.concatenate([self._costs, _costs(waiting[len(self._costs) :], packing.cost)])
        waited_N = np.array([step - w.since for w in waiting], np.int64)
        plan = self._layout.plan(self._sizes, self._costs, waited_N, packing)
        found: list[list[Waiting]] = [[] for _ in range(packing.packs)]
        left: list[Waiting] = []
        for w, pack in zip(waiting, plan.pack_N.tolist(), strict=True):
            (found[pack] if pack >= 0 else left).append(w)
        self._waiting = left
        self._sizes = [group for group, pack in zip(self._sizes, plan.pack_N.tolist(), strict=True) if pack < 0]
        self._costs = self._costs[plan.pack_N < 0]
        self.tokens = sum(group.tokens for group in self._sizes)
        return found, plan


def _costs(waiting: Sequence[Waiting], cost: CostOf) -> np.ndarray:
    """Of each group: what it says, or the sum of its documents'. Float64 `[n]`."""
    if not waiting:
        return np.zeros(0)
    of_documents = np.asarray(cost(np.concatenate([w.lengths for w in waiting])), np.float64)
    starts = np.cumsum([0, *(len(w.lengths) for w in waiting[:-1])])
    sums = np.add.reduceat(of_documents, starts)
    return np.array([float(own) if w.cost is None else w.cost for w, own in zip(waiting, sums, strict=True)])
