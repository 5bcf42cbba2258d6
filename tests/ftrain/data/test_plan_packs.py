"""Packs of one step: full, alike in cost, never with a group cut or lost."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bench.data_packing import first_fit, lengths, measured, ours
from ftrain.data.cost import Cost
from ftrain.data.packing import Packing, deal_packs, plan_packs


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=80),
    packs=st.integers(1, 9),
    waited=st.integers(0, 3),
    quadratic=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_a_plan_keeps_to_the_budget_and_takes_the_oldest(sizes, packs, waited, quadratic):
    lengths_N = np.array(sizes)
    costs_N = Cost(quadratic=quadratic)(lengths_N)
    waited_N = np.sort(np.arange(len(sizes)) % (waited + 1))[::-1]
    plan = plan_packs(lengths_N, costs_N, tokens=64, packs=packs, waited_N=waited_N, patience=2)
    used = np.bincount(plan.pack_N[plan.pack_N >= 0], weights=lengths_N[plan.pack_N >= 0], minlength=packs)
    assert plan.pack_N.min() >= -1
    assert plan.pack_N.max() < packs
    assert used.tolist() == plan.tokens_P.tolist()
    assert (used <= 64).all()
    assert (plan.pack_N >= 0).any(), "a step that takes nothing would never end"
    if (waited_N[lengths_N == lengths_N[0]] < 2).all() and quadratic == 0.0:
        assert plan.pack_N[0] >= 0, "the oldest goes first"
    late = waited_N >= 2
    if quadratic and late.sum() == 1:
        assert plan.pack_N[late] >= 0, "patience is over"


def test_a_step_of_a_full_buffer_is_full():
    stream = lengths(60_000, 8192)
    found = measured(stream, ours(Packing(8192, ranks=16)), steps=30, tokens=8192)
    assert found.padding < 0.005


def test_ranks_wait_less_for_each_other_than_with_first_fit():
    packing = Packing(8192, ranks=64, cost=Cost.of_width(4096))
    stream = lengths(64_000, 8192)
    our = measured(stream, ours(packing), steps=40, tokens=8192)
    their = measured(stream, first_fit(packing), steps=40, tokens=8192)
    assert our.imbalance < 0.035 < 0.08 < their.imbalance
    assert our.padding < their.padding


def test_what_padding_and_cost_of_packs_are_is_said():
    plan = plan_packs(np.array([6, 2]), np.array([12.0, 2.0]), tokens=8, packs=2)
    assert plan.tokens_P.tolist() == [6, 2]
    assert plan.cost_P.tolist() == [14.0, 8.0]  # padding costs what the cheapest token does


def test_a_costly_group_waits_until_it_has_waited_long_enough():
    lengths_N = np.array([60, *[4] * 60])
    costs_N = Cost(quadratic=1.0)(lengths_N)
    early = plan_packs(lengths_N, costs_N, tokens=64, packs=2)
    late = plan_packs(lengths_N, costs_N, tokens=64, packs=2, waited_N=np.array([5, *[0] * 60]), patience=5)
    never = plan_packs(lengths_N, costs_N, tokens=64, packs=2, patience=0)
    assert (early.pack_N[0], late.pack_N[0] >= 0, never.pack_N[0] >= 0) == (-1, True, True)


def test_costly_groups_come_together_when_each_pack_can_have_one():
    lengths_N = np.array([60, 61, *[4] * 60])
    plan = plan_packs(lengths_N, Cost(quadratic=1.0)(lengths_N), tokens=64, packs=2)
    assert sorted(plan.pack_N[:2].tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths_N": np.array([9])}, "groups have 9 to 9 tokens"),
        ({"lengths_N": np.array([0])}, "groups have 0 to 0 tokens"),
        ({"costs_N": np.array([0.0])}, "a cost above 0"),
        ({"costs_N": np.ones(2)}, r"shapes \[1\], \[2\], \[1\]"),
        ({"packs": 0}, "0 packs of 8 tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    given = {"lengths_N": np.array([3]), "costs_N": np.array([3.0]), "tokens": 8, "packs": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        plan_packs(given.pop("lengths_N"), given.pop("costs_N"), **given)


@given(costs=st.lists(st.floats(1, 100), min_size=12, max_size=12), ranks=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_packs_of_a_micro_batch_are_neighbours_in_cost(costs, ranks):
    dealt = deal_packs(np.array(costs), ranks=ranks, micro_batches=12 // ranks)
    assert sorted(dealt.flatten().tolist()) == list(range(12))
    by_turn = np.array(costs)[dealt].T
    assert all(before.min() >= after.max() for before, after in pairwise(by_turn))


def test_packs_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 packs are not 1 micro-batches of 2 ranks"):
        deal_packs(np.ones(3), ranks=2)
