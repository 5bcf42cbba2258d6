"""Local search on sets of recomputed tensors: it sees what a cut at one rate does not, since a cut adds bytes up.

The peak is where the sum is largest *at one time*. Keeping a tensor that is dead by then costs nothing, and a rate that
recomputes all tensors of a kind frees too much. From a few starts, single ops with their views are added or removed,
then exchanged, as long as that brings the peak below the budget or the price down.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ftrain.remat.offload import CopySchedule

_STARTS = 5
_SWEEPS = 40  # sweeps over all ops that a descent needs; larger graphs only take single tensors back


class Choice(NamedTuple):
    """A set of nodes to recompute, its `peak` in bytes beyond the arguments, and its price in `microseconds`.

    A number in `recomputed` that is not below the number of nodes stands for offloading: of the node whose number it is
    minus that of nodes. `table`: when the copies of these run.
    """

    recomputed: frozenset[int]
    peak: int
    microseconds: float
    table: CopySchedule | None = None


class Search:
    """Moves from choice to choice.

    - `price(set)`: makes a choice of a set of nodes.
    - `candidates`: the nodes that may be recomputed: number, microseconds, bytes.
    - `ops`: these nodes by op, each with its views, which are recomputed or kept together.
    - `peak`: the budget, bytes beyond the arguments.
    - `tries`: how many sets may be priced. A count and not a time, since all ranks must choose alike.
    """

    def __init__(
        self,
        price: Callable[[frozenset[int]], Choice],
        candidates: Sequence[tuple[int, float, int]],
        *,
        ops: Sequence[frozenset[int]],
        peak: int,
        tries: int,
    ) -> None:
        self._price, self._ops = price, ops
        self._microseconds = {v: us for v, us, _ in candidates}
        self._bytes = {v: size for v, _, size in candidates}
        self._peak, self._tries = peak, tries

    def best(self, starts: Iterable[Choice]) -> Choice:
        """The best choice found from the starts: the cheapest within the peak, else the one nearest to it."""
        ranked = self._distinct(sorted(starts, key=self._rank))
        if _SWEEPS * len(self._ops) > self._tries:
            return self._taken_back(ranked[0])
        nothing = min(ranked, key=lambda c: len(c.recomputed))
        chosen = self._distinct([ranked[0], nothing, *ranked[1:_STARTS]])
        return min((self._descended(c) for c in chosen), key=self._rank)

    @staticmethod
    def _distinct(choices: list[Choice]) -> list[Choice]:
        """The first choice of each set."""
        found: dict[frozenset[int], Choice] = {}
        for choice in choices:
            found.setdefault(choice.recomputed, choice)
        return list(found.values())

    def _rank(self, choice: Choice) -> tuple[int, float, list[int]]:
        return max(0, choice.peak - self._peak), choice.microseconds, sorted(choice.recomputed)

    def _descended(self, choice: Choice) -> Choice:
        """Steepest descent by single ops, or else by two at once; uses at most half of the tries."""
        least = self._tries // 2
        while self._tries > least:
            better = self._steepest(choice, (_turned(choice.recomputed, op) for op in self._ops))
            if better is choice:
                better = self._steepest(choice, self._pairs(choice.recomputed))
            if better is choice:
                break
            choice = better
        return choice

    def _pairs(self, recomputed: frozenset[int]) -> Iterator[frozenset[int]]:
        for a, b in itertools.combinations(self._ops, 2):
            yield _turned(_turned(recomputed, a), b)

    def _steepest(self, choice: Choice, sets: Iterable[frozenset[int]]) -> Choice:
        best = choice
        for recomputed in sets:
            if self._tries <= 0:
                break
            self._tries -= 1
            best = min(best, self._price(recomputed), key=self._rank)
        return best

    def _taken_back(self, choice: Choice) -> Choice:
        """For a large graph: keep single tensors after all, the most expensive first, while the choice stays within the
        budget.
        """
        for v in sorted(choice.recomputed, key=lambda v: (-self._microseconds.get(v, 0.0), v)):
            if self._tries <= 0 or self._microseconds.get(v, 0.0) <= 0:
                break
            if self._bytes[v] > 2 * (self._peak - choice.peak):
                continue
            self._tries -= 1
            choice = min(choice, self._price(choice.recomputed - {v}), key=self._rank)
        return choice


def _turned(recomputed: frozenset[int], op: frozenset[int]) -> frozenset[int]:
    """The set with the op recomputed if it was kept, else with it kept."""
    return recomputed - op if op & recomputed else recomputed | op
