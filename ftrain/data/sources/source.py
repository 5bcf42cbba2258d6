"""What every source of rows offers, and several of them as one."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from ftrain.data.sample import Place


class Row(NamedTuple):
    """The fields of a row by name, and where it stands."""

    fields: Mapping[str, Any]
    place: Place


class Source(Protocol):
    """Rows that can be read in any order, in any process: a source can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from 0. BadRow where the row is broken, IndexError where there is none."""


class Joined:
    """The rows of several sources, one source after the other.

    >>> class Words:
    ...     def __len__(self): return 2
    ...     def __getitem__(self, i): return Row({"text": "ab"[i]}, Place("words", i + 1))
    >>> joined = Joined([Words(), Words()])
    >>> len(joined), joined[3].fields
    (4, {'text': 'b'})
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Row `index` of all; IndexError where there is none."""
        checked(index, len(self))
        which = bisect_right(self._ends, index)
        return self.sources[which][index - (self._ends[which - 1] if which else 0)]


def checked(index: int, rows: int) -> int:
    """The index itself; IndexError unless it is one of `rows`, so that `for row in source` ends."""
    if not 0 <= index < rows:
        raise IndexError(f"row {index} of {rows}")
    return index
