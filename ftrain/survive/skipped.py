"""Batches that a run leaves out: kept in the run's folder, so that it leaves them out again when it goes on.

A batch is known by its position, its place in the order of the data. Step k (from 1) takes the k-th position that is
not skipped. Leaving out a position therefore changes only the steps from there on, which are those that are run again,
and a run that skips a batch has the numbers of one that never met it. The file is no part of the checkpoint: of any two
checkpoints, the earlier one too goes on without what was found to be bad after it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "skipped.json"


@dataclass(frozen=True)
class Rollback:
    """One way back: from `bad` steps, whose batches at `positions` are left out from then on, to checkpoint `back_to`
    (0: the start); `why` the last of them was bad."""

    positions: tuple[int, ...]
    bad: tuple[int, ...]
    back_to: int
    why: str


@dataclass(frozen=True)
class Skipped:
    """All ways back of a run, in order."""

    rollbacks: tuple[Rollback, ...] = ()

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions left out, ascending."""
        return tuple(sorted({p for rollback in self.rollbacks for p in rollback.positions}))

    def position(self, step: int) -> int:
        """The position of the batch of a step (from 1)."""
        position = step - 1
        for left_out in self.positions:
            if left_out > position:
                break
            position += 1
        return position

    def ranges(self, done: int, last: int) -> Iterator[tuple[int, int]]:
        """The positions of steps `done + 1` to `last` as ranges (first, end), in order; none is empty."""
        step = done + 1
        while step <= last:
            first = self.position(step)
            left_out = next((p for p in self.positions if p > first), None)
            end = first + last - step + 1 if left_out is None else min(left_out, first + last - step + 1)
            yield first, end
            step += end - first

    def after(self, rollback: Rollback) -> "Skipped":
        """With one more way back."""
        return Skipped((*self.rollbacks, rollback))

    def as_json(self) -> list[dict[str, Any]]:
        """Plain lists, numbers and texts, for `of_json`."""
        return [{**vars(r), "positions": list(r.positions), "bad": list(r.bad)} for r in self.rollbacks]

    @staticmethod
    def of_json(entries: list[dict[str, Any]]) -> "Skipped":
        """The inverse of `as_json`; KeyError or TypeError if these are no entries of it."""
        made = (
            Rollback(positions=tuple(e["positions"]), bad=tuple(e["bad"]), back_to=e["back_to"], why=e["why"])
            for e in entries
        )
        return Skipped(tuple(made))


def read_skipped(run: Path) -> Skipped:
    """What the run in the folder leaves out; nothing if it has no such file. ValueError if the file is not whole."""
    file = run / FILE
    if not file.is_file():
        return Skipped()
    try:
        return Skipped.of_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a list of rollbacks ({error!r}): mend it, or begin anew without it") from None


def write_skipped(run: Path, skipped: Skipped) -> None:
    """Replace the file; at every moment it is the old one or the new one, whole and on the disk."""
    new = run / f".{FILE}"
    with new.open("w", encoding="utf-8") as out:
        json.dump(skipped.as_json(), out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, run / FILE)
