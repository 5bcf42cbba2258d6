"""The planner beside all possible plans of small graphs: prices within 3% of the least at the same peak."""

import pytest

from tests.helpers.planners import random_planner

MOST = 11  # tensors that may be made again: 2,048 plans


def all_plans(planner):
    """Peak and price of every set of recomputed tensors."""
    candidates = [v for v, _, _ in planner.choices.candidates]
    plans = []
    for bits in range(1 << len(candidates)):
        chosen = frozenset(v for i, v in enumerate(candidates) if bits >> i & 1)
        plans.append(planner._priced(chosen))
    return plans


def ratios(seeds):
    """The planner's price over the least possible one, for graphs and budgets where there is something to choose."""
    found = []
    for seed in seeds:
        planner = random_planner(seed)
        if len(planner.choices.candidates) > MOST:
            continue
        plans = all_plans(planner)
        smallest, largest = min(p.peak for p in plans), plans[0].peak
        for share in (0.0, 0.5) if smallest < largest else ():
            peak = int(smallest + share * (largest - smallest))
            least = min(p.microseconds for p in plans if p.peak <= peak)
            choice = planner.within(peak)
            assert choice.peak <= peak
            found.append(choice.microseconds / least)
    return found


def test_the_price_is_the_least_possible():
    found = ratios(range(24))
    assert len(found) > 15
    assert max(found) <= 1.03


@pytest.mark.exhaustive
def test_the_price_is_the_least_possible_on_many_graphs():
    found = ratios(range(1000, 1700))
    assert len(found) >= 400  # two budgets of 200 graphs
    assert max(found) <= 1.03
