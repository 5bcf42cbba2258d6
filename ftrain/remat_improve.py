"""Local search on sets of recomputed tensors: what a cut at one rate does not see, since it adds bytes up.

The peak is where the sum is largest *at one time*: keeping a tensor that is gone by then costs nothing, and a rate that
takes all of a kind frees too much. From a few starts single tensors are put in or taken out, then exchanged, while that
brings the peak below the budget, or the price down.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

_STARTS = 5


class Choice(NamedTuple):
    """A set of nodes to make again: its peak in bytes beyond the arguments, and its price in microseconds."""

    remade: frozenset[int]
    peak: int
    microseconds: float


class Search:
    """Moves on choices; `tries` is a count of priced sets, not a time: all ranks must choose alike.

    `price` makes a choice of a set; `candidates` are the nodes that may be made again, with their microseconds and
    bytes.
    """

    def __init__(
        self,
        price: Callable[[frozenset[int]], Choice],
        candidates: Sequence[tuple[int, float, int]],
        *,
        peak: int,
        tries: int,
    ) -> None:
        self._price, self._candidates = price, [v for v, _, _ in candidates]
        self._microseconds = {v: us for v, us, _ in candidates}
        self._bytes = {v: size for v, _, size in candidates}
        self._peak, self._tries = peak, tries

    def best(self, starts: Iterable[Choice]) -> Choice:
        """The best choice found from the starts: the cheapest within the peak, else the one nearest to it."""
        distinct = {c.remade: c for c in sorted(starts, key=self._rank)}
        ranked = sorted(distinct.values(), key=self._rank)[:_STARTS]
        if len(self._candidates) ** 2 > self._tries:
            return self._taken_back(ranked[0])
        return min((self._descended(c) for c in ranked), key=self._rank)

    def _rank(self, choice: Choice) -> tuple[int, float, list[int]]:
        return max(0, choice.peak - self._peak), choice.microseconds, sorted(choice.remade)

    def _descended(self, choice: Choice) -> Choice:
        """The steepest way down: by single tensors, and where none helps by two at once."""
        while self._tries > 0:
            better = self._steepest(choice, (choice.remade ^ {v} for v in self._candidates))
            if better is choice:
                better = self._steepest(choice, self._pairs(choice.remade))
            if better is choice:
                break
            choice = better
        return choice

    def _pairs(self, remade: frozenset[int]) -> Iterator[frozenset[int]]:
        kept = [v for v in self._candidates if v not in remade]
        taken = sorted(remade)
        yield from ((remade - {a}) | {b} for a in taken for b in kept)
        yield from (remade | {a, b} for a, b in itertools.combinations(kept, 2))
        yield from (remade - {a, b} for a, b in itertools.combinations(taken, 2))

    def _steepest(self, choice: Choice, sets: Iterable[frozenset[int]]) -> Choice:
        best = choice
        for remade in sets:
            if self._tries <= 0:
                break
            self._tries -= 1
            best = min(best, self._price(remade), key=self._rank)
        return best

    def _taken_back(self, choice: Choice) -> Choice:
        """Of a large graph: keep after all what may be kept, dearest first, if it is not far above the room left."""
        for v in sorted(choice.remade, key=lambda v: (-self._microseconds.get(v, 0.0), v)):
            if self._tries <= 0 or self._microseconds.get(v, 0.0) <= 0:
                break
            if self._bytes[v] > 2 * (self._peak - choice.peak):
                continue
            self._tries -= 1
            choice = min(choice, self._price(choice.remade - {v}), key=self._rank)
        return choice
