"""Rows that cannot be trained on: counted by file and kind, told once a file, and too many of them end the run."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from ftrain.data.sample import Place

_log = logging.getLogger("ftrain.data")
_PLACES = 5  # remembered of each kind
_MOST_KINDS = 1000  # of files and kinds: a folder of a million broken pictures is one log line each, but not in memory


class BadRow(ValueError):
    """A row that cannot be trained on: where it is, of which kind its fault is, and what is wrong with it.

    `kind` is a few words that are the same for all rows with this fault, such as "invalid JSON".

    >>> str(BadRow(Place("chat.jsonl", 7), "null field", "'text' is null"))
    "chat.jsonl, row 7: 'text' is null"
    """

    def __init__(self, place: Place, kind: str, detail: str) -> None:
        super().__init__(place, kind, detail)
        self.place, self.kind, self.detail = place, kind, detail

    def __str__(self) -> str:
        return f"{self.place}: {self.detail}"


@dataclass
class _Kind:
    count: int = 0
    places: list[Place] = field(default_factory=list)


@dataclass(frozen=True)
class RejectedKind:
    """Rows of one file that were rejected for one reason: how many, and the numbers of the first ones."""

    file: str
    kind: str
    count: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.rows) else ""
        return f"{self.file}: {self.count} x {self.kind} (row {', '.join(map(str, self.rows))}{more})"


class Rejects:
    """Counts rows that were taken and rows that were not; ends the run past a share.

    Args:
        limit: the largest share of rejected rows, in [0, 1].
        after: from how many rows on the share is looked at; `finish` looks at it whatever the number.
        told: whether the first rejected row of each file is logged.

    ValueError for a limit that is no share.

    >>> rejects = Rejects(limit=0.5)
    >>> rejects.took()
    >>> rejects.add(BadRow(Place("a.jsonl", 2), "invalid JSON", "no JSON at column 3"))
    >>> rejects.rows, rejects.count, str(next(iter(rejects)))
    (2, 1, 'a.jsonl: 1 x invalid JSON (row 2)')
    """

    def __init__(self, *, limit: float = 0.05, after: int = 1000, told: bool = True) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"a limit of rejected rows of {limit} is no share: give a number from 0 to 1")
        self.limit, self.after, self.told = limit, after, told
        self.rows = 0
        """Rows seen, taken or not."""
        self.count = 0
        """Rows rejected."""
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._told: set[str] = set()

    def took(self, rows: int = 1) -> None:
        """Count rows that can be trained on."""
        self.rows += rows

    def add(self, error: BadRow) -> None:
        """Count a rejected row, and log the first of its file. ValueError once too many are."""
        self.rows += 1
        self.count += 1
        key = (error.place.file, error.kind)
        if key in self._kinds or len(self._kinds) < _MOST_KINDS:
            kind = self._kinds.setdefault(key, _Kind())
        else:
            kind = self._kinds.setdefault(("further files", error.kind), _Kind())
        kind.count += 1
        if len(kind.places) < _PLACES:
            kind.places.append(error.place)
        if self.told and error.place.file not in self._told and len(self._told) < _MOST_KINDS:
            self._told.add(error.place.file)
            _log.warning("a row is skipped: %s; further ones of this file are counted", error)
        if self.rows >= self.after:
            self._check(error)

    def finish(self) -> None:
        """The data is at its end: ValueError if there was none, or if too many rows were rejected."""
        if self.rows == 0:
            raise ValueError("the data has no rows")
        if self.count:
            self._check(None)

    def _check(self, last: BadRow | None) -> None:
        if self.count <= self.limit * self.rows and self.count < self.rows:
            return
        worst = max(self, key=lambda kind: kind.count)
        what = "all" if self.count == self.rows else f"{self.count / self.rows:.1%}, more than {self.limit:.1%},"
        end = "" if last is None else f"; the last one: {last}"
        raise ValueError(f"{what} of {self.rows} rows were rejected, most of them {worst}{end}")

    def __iter__(self) -> Iterator[RejectedKind]:
        for (file, kind), found in self._kinds.items():
            yield RejectedKind(file, kind, found.count, tuple(place.row for place in found.places))

    def by_kind(self) -> dict[str, int]:
        """Rejected rows by kind, over all files, the most frequent first."""
        counts: dict[str, int] = {}
        for found in self:
            counts[found.kind] = counts.get(found.kind, 0) + found.count
        return dict(sorted(counts.items(), key=lambda item: -item[1]))
