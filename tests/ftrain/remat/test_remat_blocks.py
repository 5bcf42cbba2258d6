"""The planner beside all plans of one real block of each model family, with ops joined to few groups.

A group is an op with its views, and with its neighbours where there are too many; small ones stay kept. Every set of
groups is priced by the walk that the planner uses, liveness included, so the least price over all sets is exact for
plans that take whole groups. The planner, which may take single tensors, must not be more than 3% above it.
"""

import itertools

import pytest

from ftrain.remat.planner import Planner
from tests.helpers.planners import BLOCKS, planner_of

MOST = 11  # groups: 2,048 plans


def groups_of(planner: Planner) -> list[frozenset[int]]:
    """At most `MOST` groups of the nodes that may be made again."""
    bytes_of = {v: size for v, us, size in planner.choices.candidates if us > 0}
    group_of = {v: v for v in bytes_of}
    for v, us, _ in planner.choices.candidates:
        sources = [u for u in planner.model.steps[v].reads if u in group_of]
        if us == 0 and sources:  # a view, or a part of a result
            group_of[v] = group_of[sources[0]]
    members: dict[int, set[int]] = {}
    for v, owner in group_of.items():
        members.setdefault(owner, set()).add(v)
    floor = max(bytes_of.values()) / 50
    members = {owner: found for owner, found in members.items() if bytes_of[owner] >= floor}
    sizes = {owner: bytes_of[owner] for owner in members}
    while len(members) > MOST:
        small = min(members, key=lambda g: (sizes[g], g))
        target = _neighbour(planner, members, small)
        members[target] |= members.pop(small)
        sizes[target] += sizes.pop(small)
    return [frozenset(found) for found in members.values()]


def _neighbour(planner: Planner, members: dict[int, set[int]], group: int) -> int:
    """The smallest group that reads this one or that it reads; else the next."""
    steps = planner.model.steps
    reads = {u for v in members[group] for u in steps[v].reads}
    near = [
        g
        for g, found in members.items()
        if g != group and (found & reads or any(u in members[group] for v in found for u in steps[v].reads))
    ]
    return min(near or [g for g in members if g != group], key=lambda g: (len(members[g]), g))


@pytest.mark.parametrize("family", BLOCKS)
def test_a_real_block_costs_no_more_than_the_best_plan(family):
    planner = planner_of(BLOCKS[family])
    groups = groups_of(planner)
    assert 5 <= len(groups) <= MOST
    plans = [
        planner._priced(frozenset().union(*chosen))
        for n in range(len(groups) + 1)
        for chosen in itertools.combinations(groups, n)
    ]
    smallest, nothing = min(p.peak for p in plans), planner.at_rate(0.0).peak
    assert smallest < nothing
    for share in (0.1, 0.25, 0.5, 0.75):
        peak = int(smallest + share * (nothing - smallest))
        least = min(p.microseconds for p in plans if p.peak <= peak)
        choice = planner.within(peak)
        assert choice.peak <= peak
        assert choice.microseconds <= 1.03 * least, f"{share}: {choice.microseconds} for {least}"
