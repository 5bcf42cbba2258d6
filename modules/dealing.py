"""Which documents go together: over the steps of a run, and in a step over its packs. Pure functions of the sizes.

*Carried over* (`carry_over`): a step takes its own documents while they fit the budget of a whole step; those that do
not fit go to the next steps that have room. How many packs a step has does not enter, so neither does the layout.
*Dealt* (`deal`): the documents of a step are spread over its packs, so that each holds what it is given and all have
about as much to compute. Both are greedy: bins of several kinds of room cannot be filled best in reasonable time.

Legend: N documents, D things that a budget limits, P packs, G groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftrain.modules.budget import Budget, Size, first_fit, needs


def carry_over(groups: Sequence[Sequence[Size]], budget: Budget) -> list[list[tuple[int, int]]]:
    """For each group, as (group, place in it), the documents that it has in the end: each document is in one group.

    A group has its own documents, in order, and behind them those of other groups that it has room for: what does not
    fit a group goes to the next that has room, from the first again behind the last. A document for which none has
    room stays in its own, which then exceeds the budget. ValueError for a document that alone exceeds it.

    >>> three = [Size(tokens, {}, {}, {}) for tokens in (6, 5, 4)]
    >>> carry_over([three, [Size(2, {}, {}, {})]], Budget(10))  # the document of 5 tokens goes to the other group
    [[(0, 0), (0, 2)], [(1, 0), (0, 1)]]
    """
    found: list[list[tuple[int, int]]] = []
    moving: list[tuple[int, int]] = []
    all_needs = [needs(sizes, budget) for sizes in groups]
    free_GD = np.stack([n.limits_D for n in all_needs])
    for group, own in enumerate(all_needs):
        taken, left = first_fit(own)
        found.append([(group, place) for place in taken])
        moving += [(group, place) for place in left]
        free_GD[group] -= own.needs_ND[taken].sum(0)
    for home, place in moving:
        need_D = all_needs[home].needs_ND[place]
        after = [(home + 1 + i) % len(groups) for i in range(len(groups))]
        group = next((g for g in after if (need_D <= free_GD[g]).all()), home)
        found[group].append((home, place))
        free_GD[group] -= need_D
    return found


class Dealt(NamedTuple):
    """`packs`: the numbers of the documents of each pack, in rising order; `left`: of those that no pack has room for;
    `short`: what they lack, keys of `Budget.limits`.
    """

    packs: list[list[int]]
    left: list[int]
    short: frozenset[str]


def deal(sizes: Sequence[Size], budget: Budget, *, packs: int, parts: int = 1) -> Dealt:
    """Spread documents over `packs` packs of `budget` each, in which no item of media lies in two of `parts` parts.

    The largest go first, each to the pack with room that is emptiest of what the document needs; attention's work, the
    squares of lengths, counts as one more need. One pack takes them first fit, in the given order. ValueError for a
    document that alone exceeds the budget, or whose items alone exceed the parts.

    >>> deal([Size(tokens, {}, {}, {}) for tokens in (6, 5, 3, 2)], Budget(8), packs=2).packs
    [[0, 3], [1, 2]]
    """
    names, needs_ND, limits_D = needs(sizes, budget)
    _check_parts(sizes, budget, parts)
    work_N = np.array([float(size.tokens) ** 2 for size in sizes])
    share_NE = np.column_stack([needs_ND / np.maximum(limits_D, 1), work_N * packs / max(1.0, work_N.sum())])
    load_PE, free_PD = np.zeros((packs, share_NE.shape[1])), np.tile(limits_D, (packs, 1))
    filled = [_Filled(budget, parts) for _ in range(packs)]
    dealt: list[list[int]] = [[] for _ in range(packs)]
    left, short = list[int](), set[str]()
    order = range(len(sizes)) if packs == 1 else np.argsort(-share_NE.max(1), kind="stable").tolist()
    for number in order:
        room_P = (needs_ND[number] <= free_PD).all(1)
        fullness_P = np.where(room_P, load_PE @ share_NE[number], np.inf)
        candidates = [int(p) for p in np.lexsort((load_PE.sum(1), fullness_P)) if room_P[p]]
        chosen = next((p for p in candidates if not filled[p].overflow(sizes[number])), None)
        if chosen is None:
            left.append(number)
            short.update(name for name, lacks in zip(names, (needs_ND[number] > free_PD).any(0), strict=True) if lacks)
            short.update(f"{name} rows" for p in candidates for name in filled[p].overflow(sizes[number]))
            continue
        dealt[chosen].append(number)
        filled[chosen].take(sizes[number])
        load_PE[chosen] += share_NE[number]
        free_PD[chosen] -= needs_ND[number]
    return Dealt([sorted(pack) for pack in dealt], sorted(left), frozenset(short))


class _Filled:
    """The items of media of one pack, which must go into parts whole."""

    def __init__(self, budget: Budget, parts: int) -> None:
        self._rows, self._parts = budget.rows, parts
        self._items: dict[str, list[int]] = {name: [] for name in budget.rows}

    def overflow(self, size: Size) -> list[str]:
        """The modalities whose items would not all go into parts with this document's; its rows have room."""
        return [
            name
            for name, rows in size.items.items()
            if self._parts > 1
            and item_parts([*self._items[name], *rows], parts=self._parts, capacity=self._rows[name] // self._parts)
            is None
        ]

    def take(self, size: Size) -> None:
        for name, rows in size.items.items():
            self._items[name] += rows


def eased(count: int) -> int:
    """The next number that is a power of two or three halves of one, at least 1: few numbers occur, and less than half
    of one is to spare.

    >>> from ftrain.modules.dealing import eased
    >>> [eased(n) for n in (0, 1, 3, 5, 7, 13)]
    [1, 1, 3, 6, 8, 16]
    """
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def item_parts(rows: Sequence[int], *, parts: int, capacity: int) -> list[int] | None:
    """Which of `parts` parts each item goes to: the longest first, each to the emptiest part; None if one has no room.

    `rows`: of each item; `capacity`: rows that a part has room for.

    >>> from ftrain.modules.dealing import item_parts
    >>> item_parts([2, 6, 3], parts=2, capacity=6)
    [1, 0, 1]
    """
    used, found = [0] * parts, [0] * len(rows)
    for item in sorted(range(len(rows)), key=lambda i: (-rows[i], i)):
        part = used.index(min(used))
        if used[part] + rows[item] > capacity:
            return None
        used[part] += rows[item]
        found[item] = part
    return found


def _check_parts(sizes: Sequence[Size], budget: Budget, parts: int) -> None:
    for number, size in enumerate(sizes):
        if _Filled(budget, parts).overflow(size):
            raise ValueError(
                f"document {number}: its media does not fit {parts} parts of a budget of {dict(budget.rows)} rows, "
                "since no item may lie in two parts: raise the budget"
            )
