"""From documents in the order of a run to the packs of its steps, the same in every process.

T tokens of a pack, P packs of a step.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ftrain.data.buffer import TOO_LONG, Buffer, Waiting, pieces
from ftrain.data.encoding_ahead import Drawn
from ftrain.data.layout import Layout
from ftrain.data.packing import Packing, Plan
from ftrain.data.position import Position
from ftrain.data.rejects import BadRow, Rejects

AtEpochEnd = Literal["carry", "pack"]


class StepPacks(NamedTuple):
    """The groups of each of the P packs of a step, their plan, and the position after the step. `epochs`: how often the
    data was gone through by then, in rows that were trained on or left out.
    """

    packs: list[list[Waiting]]
    plan: Plan
    epochs: float
    position: Position


class Reading:
    """A run's data as it is read.

    `epoch`: places of one; `cycle`: as many have every row (`Order.cycle`); `last`: the place at which the order ends.

    `encoded`: the places that the position holds, in rising order, and then those from its next one on.
    """

    def __init__(
        self,
        encoded: Iterator[Drawn],
        position: Position,
        *,
        packing: Packing,
        layout: Layout,
        epoch: int,
        cycle: int,
        last: int,
        at_epoch_end: AtEpochEnd,
        rejects: Rejects,
    ) -> None:
        """ValueError where a document that the position holds is gone."""
        self._encoded, self._position, self._packing, self._rejects = encoded, position, packing, rejects
        self._epoch, self._cycle, self._last, self._at_epoch_end = epoch, cycle, last, at_epoch_end
        self._buffer = Buffer(packing, layout)
        self._next, self._rejected, self._rejected_in_a_row = position.next, position.rejected, 0
        self._last_rejected: BadRow | None = None
        self._over: list[Waiting] = []  # of the place `_next`, which was read and does not fit into the buffer
        self._read_again(position.held)

    def _read_again(self, held: np.ndarray) -> None:
        made: list[Waiting] = []
        before = -1
        for place, piece, since in held.tolist():
            if place != before:
                found, before = next(self._encoded), place
                try:
                    made = pieces(found, self._packing, since=since)
                except BadRow as error:
                    raise ValueError(f"the data is not what it was when the position was saved: {error}") from error
            if piece >= len(made):
                raise ValueError(f"the data is not what it was when the position was saved: place {place} is shorter")
            self._buffer.add(made[piece])

    def steps(self) -> Generator[StepPacks]:
        """The packs of the steps that follow. ValueError where no row of an epoch can be trained on, and whatever
        `rejects` raises.
        """
        while True:
            self._fill()
            if not len(self._buffer):
                if not self._position.documents and self._last_rejected is not None:
                    raise self._nothing(self._rejected, self._last_rejected)
                return
            packs, plan = self._buffer.take(step=self._position.step)
            self._position = self._after(packs, plan)
            waiting = len(np.unique(self._position.held[:, 0]))
            yield StepPacks(packs, plan, (self._next - waiting) / self._epoch, self._position)

    def _after(self, packs: Sequence[Sequence[Waiting]], plan: Plan) -> Position:
        before, tokens = self._position, self._packing.tokens
        most = max(_offsets(pack, tokens) for pack in packs)
        return Position(
            order=before.order,
            budget=before.budget,
            step=before.step + 1,
            next=self._next,
            documents=before.documents + sum(len(w.lengths) for pack in packs for w in pack),
            tokens=before.tokens + int(plan.tokens_P.sum()),
            rejected=self._rejected,
            slots=max(before.slots, 1 << (most - 1).bit_length()),
            held=self._buffer.held,
        )

    def _fill(self) -> None:
        """Read on until enough waits; not into the next epoch while documents of this one wait, where it ends alone.

        Of data that is smaller than the buffer two steps are enough, so that few epochs are in it.
        """
        waiting, capacity = self._packing.waiting, self._packing.capacity
        enough = min(waiting, 2 * self._packing.packs * self._packing.tokens)
        while self._buffer.tokens < waiting and self._next < self._last:
            at_end = self._next % self._epoch == 0
            if at_end and self._at_epoch_end == "pack" and len(self._buffer):
                return
            if self._buffer.tokens >= enough and self._next - self._buffer.oldest >= self._epoch:
                return
            made = self._over or self._read()
            if made and len(self._buffer) and len(self._buffer) + len(made) > capacity:
                self._over = made
                return
            for group in made:
                self._buffer.add(group)
            self._over = []
            self._next += 1

    def _read(self) -> list[Waiting]:
        """What place `_next` gives to the packs: nothing, where its row is left out."""
        try:
            made = pieces(next(self._encoded), self._packing, since=self._position.step)
        except BadRow as error:
            self._reject(error)
            return []
        self._rejected_in_a_row = 0
        self._rejects.took()
        return made

    def _reject(self, error: BadRow) -> None:
        if self._packing.too_long == "error" and error.kind == TOO_LONG:
            raise ValueError(f"{error}: raise the tokens of a pack, or let such rows be rejected or cut") from error
        self._rejected += 1
        self._rejected_in_a_row += 1
        self._rejects.add(error)
        self._last_rejected = error
        if self._rejected_in_a_row >= self._cycle:
            raise self._nothing(self._epoch, error)

    def _nothing(self, rows: int, last: BadRow) -> ValueError:
        return ValueError(f"none of {rows} rows can be trained on; the last one: {last}")


def _offsets(pack: Sequence[Waiting], tokens: int) -> int:
    """How many documents a pack has, with those that its padding is."""
    lengths = np.concatenate([w.lengths for w in pack]) if pack else np.zeros(0, np.int64)
    return len(lengths) + -(-(tokens - int(lengths.sum())) // int(lengths.max(initial=1)))
