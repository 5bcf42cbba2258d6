"""Batches that a run leaves out: kept in the run's folder, so that it leaves them out again when it goes on.

A batch is known by its position, its place in the order of the data. Step k (from 1) takes the k-th position that is
not skipped. Leaving out a position therefore changes only the steps from there on, which are those that are run again,
and a run that skips a batch has the numbers of one that never met it. The file is no part of the checkpoint: of any two
checkpoints, the earlier one too goes on without what was found to be bad after it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrain.checkpoint.durable import write_text
from ftrain.files.beneath import Folder
from ftrain.files.outside import JSON_BYTES, check, listed, parse, record, text, whole

FILE = "skipped.json"
ENTRIES = listed(
    record(
        {
            "positions": listed(whole(), least=1),
            "bad": listed(whole(1)),
            "back_to": whole(),
            "why": text(),
        }
    )
)
"""The shape of what `Skipped.as_json` gives."""


@dataclass(frozen=True)
class Rollback:
    """One rollback: from `bad` steps, whose batches at `positions` are left out from then on, to checkpoint `back_to`
    (0: the start); `why` the last of them was bad."""

    positions: tuple[int, ...]
    bad: tuple[int, ...]
    back_to: int
    why: str


@dataclass(frozen=True)
class Skipped:
    """All rollbacks of a run, in order.

    >>> from ftrain.resilience.skipped import Rollback, Skipped
    >>> skipped = Skipped((Rollback(positions=(3, 4), bad=(4, 5), back_to=2, why="the loss is nan"),))
    >>> [skipped.position(step) for step in range(1, 7)]
    [0, 1, 2, 5, 6, 7]
    >>> list(skipped.ranges(0, 6))
    [(0, 3), (5, 8)]
    """

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
        """With one more rollback."""
        return Skipped((*self.rollbacks, rollback))

    def as_json(self) -> list[dict[str, Any]]:
        """Plain lists, numbers and texts, for `of_json`."""
        return [{**vars(r), "positions": list(r.positions), "bad": list(r.bad)} for r in self.rollbacks]

    @staticmethod
    def of_json(entries: list[dict[str, Any]]) -> "Skipped":
        """The inverse of `as_json`, for entries of the shape `ENTRIES`."""
        made = (
            Rollback(positions=tuple(e["positions"]), bad=tuple(e["bad"]), back_to=e["back_to"], why=e["why"])
            for e in entries
        )
        return Skipped(tuple(made))


def read_skipped(run: Path) -> Skipped:
    """What the run in the folder leaves out; nothing if it has no such file.

    Raises:
        ValueError: the file is not what `write_skipped` writes; it is named.
        OSError: it cannot be read.
    """
    file = run / FILE
    try:
        with Folder(run) as folder:
            content = folder.read(FILE, limit=JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return Skipped()
    try:
        return Skipped.of_json(check(parse(content, str(file)), ENTRIES, str(file)))
    except ValueError as error:
        raise ValueError(f"{file} is not a list of rollbacks ({error}): mend it, or begin anew without it") from None


def write_skipped(run: Path, skipped: Skipped) -> None:
    """Replace the file; at every moment it is the old one or the new one, whole and on the disk. OSError."""
    write_text(run / FILE, json.dumps(skipped.as_json(), indent=1))
