"""Groups that were read and wait for their pack, the oldest first."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ftrain.data.cost import CostOf
from ftrain.data.documents import Document, Group
from ftrain.data.packing import Packing, Plan, plan_packs
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

TOO_LONG = "longer than a pack"
"""The kind of `BadRow` that says so."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A group, its `tokens` and `cost`; `place`, `piece` and `since` are a row of `Position.held`."""

    group: Group
    tokens: int
    cost: float
    place: int
    piece: int
    since: int


class Buffer:
    """Waiting groups; `tokens`: of all of them."""

    def __init__(self, cost: CostOf) -> None:
        self._cost = cost
        self._waiting: list[Waiting] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held(self) -> np.ndarray:
        """Int64 `[n, 3]`, as `Position.held`."""
        rows = [(w.place, w.piece, w.since) for w in self._waiting]
        return np.array(rows, np.int64).reshape(len(rows), 3)

    def add(self, group: Group, *, place: int, piece: int, since: int) -> None:
        """Put a group behind all others."""
        lengths = np.array([len(document) for document in group.documents], np.int64)
        tokens = int(lengths.sum())
        cost = float(np.sum(self._cost(lengths))) if group.cost is None else group.cost
        self._waiting.append(Waiting(group, tokens, cost, place, piece, since))
        self.tokens += tokens

    def take(self, packing: Packing, *, step: int) -> tuple[list[list[Group]], Plan]:
        """The groups of each pack of the step after `step` others, which leave the buffer, and their plan."""
        waiting = self._waiting
        plan = plan_packs(
            np.array([w.tokens for w in waiting], np.int64),
            np.array([w.cost for w in waiting]),
            waited_N=np.array([step - w.since for w in waiting], np.int64),
            tokens=packing.tokens,
            packs=packing.packs,
            patience=packing.patience,
            tolerance=packing.tolerance,
        )
        found: list[list[Group]] = [[] for _ in range(packing.packs)]
        for w, pack in zip(waiting, plan.pack_N.tolist(), strict=True):
            if pack >= 0:
                found[pack].append(w.group)
                self.tokens -= w.tokens
        self._waiting = [w for w, pack in zip(waiting, plan.pack_N.tolist(), strict=True) if pack < 0]
        return found, plan


def pieces(group: Group, *, tokens: int, cut: str, where: Place) -> list[Group]:
    """The group itself, or with `cut="split"` the pieces of a document that is longer than a pack.

    A piece knows nothing of the tokens before it; the label of its last token is the first token of the next piece.
    BadRow for a group that is longer and may not be cut.
    """
    if len(group) <= tokens:
        return [group]
    if cut == "split" and len(group.documents) == 1:
        return list(_split(group, tokens))
    several = f" in {len(group.documents)} documents that belong together" if len(group.documents) > 1 else ""
    raise BadRow(where, TOO_LONG, f"it has {len(group)} tokens{several}, and a pack {tokens}")


def _split(group: Group, tokens: int) -> Iterator[Group]:
    (document,) = group.documents
    for start in range(0, len(document), tokens):
        end = min(start + tokens, len(document))
        cost = None if group.cost is None else group.cost * (end - start) / len(document)
        leaves = {name: array[start:end] for name, array in document.leaves.items()}
        yield Group((Document(document.tokens[start:end], document.labels[start:end], leaves),), cost)
