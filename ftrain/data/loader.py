"""The steps of a run as batches: documents in the order of a key, packed, dealt to ranks and micro-batches.

All processes read the same documents and plan the same packs of a whole step; each lays out only its own. So what a
step trains on depends on neither ranks nor workers, and a position of one run is one of any other.

T tokens of a pack, R ranks, M micro-batches, P = R * M packs of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ftrain.data.documents import Group
from ftrain.data.encoding_ahead import Encode, Places, Rows, Workers, encode_ahead
from ftrain.data.finishing import Finish, finished
from ftrain.data.layout import Layout, PackLayout
from ftrain.data.order import Order
from ftrain.data.packing import Packing, Plan, Shape, deal_packs
from ftrain.data.position import Position
from ftrain.data.reading import AtEpochEnd, Reading, StepPacks
from ftrain.data.rejects import Rejects

_ENDLESS = 2**40  # places: more than any run reads


class Facts(NamedTuple):
    """Of the whole step, on all ranks alike.

    - `step`: its number, from 1; `epochs`: how often the data was gone through after it, in rows.
    - `documents`, `tokens`: in its packs; `budget`: tokens that its packs have room for.
    - `shapes`: of batches, that this reading had up to it; a step is traced once for each.
    - `rejected`: rows left out since the start of the run.
    - `imbalance`: what ranks wait for each other, as a part of the mean: the costliest pack of each micro-batch over
      the mean one, less 1.
    """

    step: int
    epochs: float
    documents: int
    tokens: int
    budget: int
    shapes: int
    rejected: int
    imbalance: float


class Step(NamedTuple):
    """A step's `batch` for this process, facts of the whole step, the position after it, and how many documents that
    the facts count for this process could not be read when their turn came (`Loader.finish`).
    """

    batch: dict[str, Any]
    facts: Facts
    position: Position
    unread: int = 0


@dataclass(frozen=True)
class Loader:
    """Steps of batches.

    Args:
        order: which document comes when.
        sources: whose sizes `order` knows, in its order.
        encode: from a row to documents, or to None or `BadRow` for a row that is left out.
        packing: how documents become packs.
        rank: of this process; None gets the packs of all ranks, one rank after the other.
        epochs, steps: how long; without both it is one epoch, with both whichever is over first.
        at_epoch_end: "carry" packs the last documents of an epoch with the first of the next one; "pack" packs them
            alone, and what room is left is padding. The last epoch always ends so.
        workers: who encodes ahead.
        rejects: told of every row, taken or not; it ends the run when too many are left out. None: any number may be
            left out, and the first of each file is logged.
        finish: what only the process does that trains on a group, such as decoding media
            (`ftrain.data.finishing`); threads of `workers` do it.
        others: where this process gets the packs of all ranks and trains on some: `mine` is the rank whose packs it
            trains on, and `others` does with groups of the other packs what `finish` does with its own.
        leaves: names and dtypes of leaves that documents have beside tokens and labels.
        slots: documents for which a pack's offsets have room from the start; more make room, and a step is then traced
            again.
        layout: how documents lie in a batch; default: in packs. Rows of their own are a `RowLayout`.

    Raises:
        ValueError: sources do not have the sizes of the order, a rank that there is not, or no end.

    >>> from ftrain.data.documents import Document
    >>> rows = [np.array([5, 6]), np.array([7, 8, 9])]
    >>> encode = lambda ids: Group((Document(ids, ids),))
    >>> loader = Loader(Order([2], key=0), [rows], encode, Packing(tokens=8))
    >>> [(step.facts.documents, step.facts.tokens) for step in loader]
    [(2, 5)]
    """

    order: Order
    sources: Sequence[Rows]
    encode: Encode
    packing: Packing
    rank: int | None = 0
    epochs: int | None = None
    steps: int | None = None
    at_epoch_end: AtEpochEnd = "carry"
    workers: Workers = Workers()  # noqa: RUF009  # frozen
    rejects: Rejects | None = None
    finish: Finish | None = None
    others: Finish | None = None
    mine: int = 0
    leaves: Mapping[str, np.dtype] | None = None
    slots: int = 0
    layout: Layout = field(default_factory=PackLayout)

    def __post_init__(self) -> None:
        """ValueError, as the class says."""
        sizes = tuple(len(source) for source in self.sources)
        if sizes != self.order.sizes:
            raise ValueError(f"the sources have {sizes} rows, and the order was made for {self.order.sizes}")
        if self.rank is not None and not 0 <= self.rank < self.packing.ranks:
            raise ValueError(f"rank {self.rank} of {self.packing.ranks} ranks: ranks count from 0")
        if self.at_epoch_end not in ("carry", "pack"):
            raise ValueError(f"at_epoch_end={self.at_epoch_end!r} is neither 'carry' nor 'pack'")
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def __iter__(self) -> Iterator[Step]:
        """All steps, from the first."""
        return self.read()

    def start(self) -> Position:
        """The position before the first step."""
        return Position(order=self.order.fingerprint, budget=self.packing.tokens, slots=self.slots)

    def read(self, position: Position | None = None) -> Iterator[Step]:
        """The steps after `position`; None: all. Close the iterator to end its workers.

        Raises:
            ValueError: the position is of another order or budget, no row of an epoch can be trained on, or what
                sources, `encode` and `rejects` raise.
        """
        position = self.start() if position is None else position
        rejects = Rejects(limit=1.0) if self.rejects is None else self.rejects
        self._check(position)
        if self.steps is not None and position.step >= self.steps:
            return
        again = tuple(np.unique(position.held[:, 0]).tolist())
        places = Places(again, position.next, self._last_place)
        encoded = encode_ahead(self.order, self.sources, self.encode, places=places, workers=self.workers)
        try:
            reading = Reading(
                encoded,
                position,
                packing=self.packing,
                layout=self.layout,
                epoch=len(self.order),
                cycle=self.order.cycle,
                last=self._last_place,
                at_epoch_end=self.at_epoch_end,
                rejects=rejects,
            )
            planned, shapes = self._until_the_end(reading), set[Shape]()
            threads = self.workers.threads if self.workers.finishing is None else self.workers.finishing
            finish = None if self.finish is None else self._finish
            for found, packs in finished(planned, self._own, finish, threads=threads, rejects=rejects):
                shapes.add(found.plan.shape)
                yield self._step(found, packs, len(shapes))
        finally:
            encoded.close()

    def _until_the_end(self, reading: Reading) -> Iterator[StepPacks]:
        for found in reading.steps():
            yield found
            if found.position.step == self.steps:
                return

    @property
    def _last_place(self) -> int:
        if self.epochs is None and self.steps is not None:
            return _ENDLESS
        return (self.epochs or 1) * len(self.order)

    def _check(self, position: Position) -> None:
        if position.order != self.order.fingerprint:
            raise ValueError(
                "the position is of another order of documents: go on with the sources (as many rows), the key and the "
                "weights of the run that saved it"
            )
        if position.budget != self.packing.tokens:
            raise ValueError(
                f"the position is of packs of {position.budget} tokens, and these have {self.packing.tokens}: go on "
                "with the same budget"
            )

    def _dealt(self, found: StepPacks) -> np.ndarray:
        packing = self.packing
        return deal_packs(found.plan.cost_P, ranks=packing.ranks, micro_batches=packing.micro_batches)

    def _own(self, found: StepPacks) -> list[list[Group]]:
        dealt_RM = self._dealt(found)
        own = dealt_RM.flatten() if self.rank is None else dealt_RM[self.rank]
        return [[waiting.group(self.packing.tokens) for waiting in found.packs[pack]] for pack in own.tolist()]

    def _finish(self, pack: int) -> Finish:
        """What is done with the groups of a pack, by its number among those that this process gets."""
        assert self.finish is not None
        foreign = self.others is not None and pack // self.packing.micro_batches != self.mine
        return self.others if foreign and self.others is not None else self.finish

    def _step(self, found: StepPacks, packs: Sequence[Sequence[Group]], shapes: int) -> Step:
        packing, position = self.packing, found.position
        batch = self.layout.batch(packs, found.plan, slots=position.slots, leaves=self.leaves)
        facts = Facts(
            step=position.step,
            epochs=found.epochs,
            documents=sum(len(waiting.lengths) for pack in found.packs for waiting in pack),
            tokens=int(found.plan.tokens_P.sum()),
            budget=found.plan.shape.places * packing.packs,
            shapes=shapes,
            rejected=position.rejected,
            imbalance=_imbalance(found.plan, self._dealt(found)),
        )
        planned = sum(len(group.documents) for pack in self._own(found) for group in pack) if self.finish else 0
        read = sum(len(group.documents) for pack in packs for group in pack) if self.finish else 0
        return Step(batch, facts, position, planned - read)


def _imbalance(plan: Plan, dealt_RM: np.ndarray) -> float:
    """Of the costliest pack of each micro-batch over the mean one, less 1."""
    cost_RM = plan.cost_P[dealt_RM]
    return float(cost_RM.max(0).sum() / cost_RM.mean(0).sum() - 1)
