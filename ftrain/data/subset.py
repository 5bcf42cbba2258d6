"""Rows that are held out of training, and the others: chosen from a key, the same in every process."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Subset:
    """Some rows of a source with `len` and `[]`, by their numbers."""

    def __init__(self, source: Any, rows: Sequence[int] | np.ndarray) -> None:
        self._source, self._rows = source, np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        """The row with this number among those chosen. Errors are those of the source."""
        return self._source[int(self._rows[index])]


def hold_out(source: Any, share: float, *, key: int, most: int = 1000) -> tuple[Subset, Subset]:
    """`(trained, held_out)`: of the rows this share, at most `most`, is held out, and at least one stays.

    ValueError for a share that is not in [0, 1).

    >>> trained, held = hold_out("abcdefghij", 0.2, key=0)
    >>> len(trained), len(held), sorted([*trained, *held]) == list("abcdefghij")
    (8, 2, True)
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of {share} held out: give a number from 0 to below 1")
    count = min(round(share * len(source)), most, max(len(source) - 1, 0))
    chosen = np.random.default_rng([key, len(source)]).permutation(len(source))
    return Subset(source, np.sort(chosen[count:])), Subset(source, np.sort(chosen[:count]))
