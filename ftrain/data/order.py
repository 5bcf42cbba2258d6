"""The order in which a run draws documents: a pure function of a key and the sizes of sources, by grain.

*Place* k of the order is the k-th document that is drawn, from 0 on, over all epochs. Nobody holds the order: place k
is computed, so that a run goes on anywhere, and any number of ranks and workers reads the same documents.

S sources.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from ftrain.data.mixture import checked_weights, turn, whole_weights

try:
    import grain
except ImportError as absent:
    raise ValueError('the order of documents is made by grain: pip install "ftrain-omni[train]"') from absent

_MOST_ROWS = 2**32 - 1  # grain's shuffle computes with 32 bits
_KEPT = 2**18  # rows whose order takes a megabyte


class Draw(NamedTuple):
    """A document by its source and its row there, from 0."""

    source: int
    row: int


class Order:
    """Draws from sources of these `sizes`.

    Without `weights` an epoch is all rows of all sources, each once, shuffled together anew in each epoch. With
    `weights` (`ftrain.data.mixture`) sources are drawn from in these proportions, evenly interleaved; each source is
    gone through in passes of its own, shuffled anew, in which each row comes once. An epoch of a mixture has as many
    documents as its sources together.

    Args:
        sizes: rows of each source; none is empty.
        key: of the shuffle: one key, one order. A whole number of at most 64 bits.
        weights: of documents; None: by size.
        shuffle: False draws rows as they lie, one source after the other without weights.

    Raises:
        ValueError: there is no source, one is empty or too large, or weights do not fit.

    >>> order = Order([3, 2], key=0)
    >>> len(order), sorted(order[k] for k in range(5))[0]
    (5, Draw(source=0, row=0))
    """

    def __init__(
        self, sizes: Sequence[int], *, key: int, weights: Sequence[float] | None = None, shuffle: bool = True
    ) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        if not self.sizes:
            raise ValueError("an order of no sources: give one at least")
        for i, size in enumerate(self.sizes):
            if not 0 < size <= _MOST_ROWS:
                raise ValueError(f"source {i} has {size} rows: a source has 1 to {_MOST_ROWS}")
        self.key, self.shuffle = int(key), shuffle
        self.weights = None if weights is None else checked_weights(weights, len(self.sizes))
        if self.weights is None:
            if sum(self.sizes) > _MOST_ROWS:
                raise ValueError(f"{sum(self.sizes)} rows of all sources: at most {_MOST_ROWS} are shuffled together")
            self._rows = [self._shuffled(sum(self.sizes), 0)]
            self._ends = list(accumulate(self.sizes))
        else:
            self._rows = [self._shuffled(size, stream) for stream, size in enumerate(self.sizes)]
            self._counts = whole_weights(self.weights)

    def _shuffled(self, rows: int, stream: int) -> Any:
        return _Shuffled(rows, (self.key % 2**64, stream)) if self.shuffle else grain.MapDataset.source(range(rows))

    def __len__(self) -> int:
        """Documents of an epoch."""
        return sum(self.sizes)

    def __getitem__(self, place: int) -> Draw:
        """What is drawn at a place, of any epoch. IndexError for a place before the first."""
        if place < 0:
            raise IndexError(f"place {place} of an order: places count from 0")
        if self.weights is not None:
            source, count = turn(place, self._counts)
            return Draw(source, int(self._rows[source][count]))
        row = int(self._rows[0][place])
        source = bisect_right(self._ends, row)
        return Draw(source, row - (self._ends[source] - self.sizes[source]))

    @property
    def cycle(self) -> int:
        """Any so many places one after the other hold each row of each source at least once."""
        if self.weights is None:
            return 2 * len(self)
        return max(ceil(2 * size / weight) + 2 for size, weight in zip(self.sizes, self.weights, strict=True))

    @property
    def fingerprint(self) -> int:
        """A number of 63 bits that another order has not: a position in one order means nothing in another."""
        weights = [] if self.weights is None else self._counts
        told = [self.key % 2**64, int(self.shuffle), len(self.sizes), *self.sizes, *weights]
        high, low = np.random.SeedSequence(told).generate_state(2)
        return (int(high) << 31 | int(low) >> 1) & (2**63 - 1)


class _Shuffled:
    """Numbers of rows, shuffled anew in each epoch.

    grain computes each by itself, in a time that grows as sources get smaller: of small ones an epoch's order is made
    at once, and the last one is kept.
    """

    def __init__(self, rows: int, seed: tuple[int, int]) -> None:
        self._rows, self._seed = rows, seed
        # grain counts its seed up from epoch to epoch, so seeds of neighbouring keys must lie far from each other
        word = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._large = grain.MapDataset.source(range(rows)).shuffle(seed=word) if rows > _KEPT else None
        self._last: tuple[int, np.ndarray] = (-1, np.zeros(0, np.uint32))

    def __getitem__(self, place: int) -> int:
        if self._large is not None:
            return self._large[place]
        epoch, at = divmod(place, self._rows)
        last = self._last
        if last[0] != epoch:
            draws = np.random.Philox(np.random.SeedSequence([*self._seed, epoch])).random_raw(self._rows)
            last = self._last = (epoch, np.argsort(draws, kind="stable").astype(np.uint32))
        return int(last[1][at])
