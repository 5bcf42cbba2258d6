"""Which documents go together: over steps nothing is lost, over packs nothing exceeds its room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.modules.budget import Bound, Budget, Size, first_fit, needs
from ftrain.modules.dealing import carry_over, deal, item_parts

BUDGET = Budget(
    100,
    rows={"image": 64, "audio": 96},
    targets={"draw": 4},
    bounds={"tokens": Bound(12), "image": Bound(6), "audio": Bound(8)},
)


def size(tokens: int, images: list[int], clips: int, drawings: int) -> Size:
    items = {"image": images} if images else {}
    items |= {"audio": [8] * clips} if clips else {}
    targets = {"draw": drawings} if drawings else {}
    return Size(tokens, {name: sum(rows) for name, rows in items.items()}, targets, items)


SIZES = st.builds(
    size, st.integers(1, 40), st.lists(st.sampled_from([4, 12, 16]), max_size=2), st.integers(0, 2), st.integers(0, 1)
)


def fits(sizes: list[Size]) -> bool:
    found = needs(sizes, BUDGET)
    return bool((found.needs_ND.sum(0) <= found.limits_D).all())


@given(st.lists(st.lists(SIZES, max_size=15), min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_every_document_is_in_one_group_and_in_its_own_if_that_has_room(groups: list[list[Size]]) -> None:
    found = carry_over(groups, BUDGET)
    everything = [(g, i) for g, own in enumerate(groups) for i in range(len(own))]
    assert sorted(x for held in found for x in held) == everything
    sizes = [[groups[g][i] for g, i in held] for held in found]
    for group, (held, own) in enumerate(zip(found, groups, strict=True)):
        if fits(own):
            assert held[: len(own)] == [(group, i) for i in range(len(own))]
        if not fits(sizes[group]):  # by documents of its own that no other group has room for
            _, over = first_fit(needs(own, BUDGET))
            others = [s for g, s in enumerate(sizes) if g != group]
            stayed = [own[i] for i in over if (group, i) in held]
            assert stayed
            assert not any(fits([*other, one]) for other in others for one in stayed)


def test_what_does_not_fit_goes_to_the_next_group_with_room() -> None:
    twenty = size(20, [], 0, 0)
    groups = [[twenty] * 3, [twenty] * 6, [twenty] * 5, [twenty] * 4]
    assert carry_over(groups, BUDGET) == [
        [(0, 0), (0, 1), (0, 2)],
        [(1, i) for i in range(5)],
        [(2, i) for i in range(5)],
        [(3, 0), (3, 1), (3, 2), (3, 3), (1, 5)],
    ]
    assert carry_over([[twenty] * 3, [twenty] * 6], BUDGET)[0][-1] == (1, 5)
    assert carry_over([[twenty] * 6], BUDGET) == [[(0, i) for i in range(6)]]


@given(st.lists(SIZES, max_size=40), st.integers(1, 8), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=150)
def test_dealt_documents_fit_and_what_is_left_says_what_it_lacks(sizes: list[Size], packs: int, parts: int) -> None:
    dealt = deal(sizes, BUDGET, packs=packs, parts=parts)
    assert sorted([*(i for pack in dealt.packs for i in pack), *dealt.left]) == list(range(len(sizes)))
    for pack in dealt.packs:
        held = [sizes[i] for i in pack]
        assert fits(held)
        for name, rows in BUDGET.rows.items():
            items = [n for s in held for n in s.items.get(name, [])]
            assert item_parts(items, parts=parts, capacity=rows // parts) is not None
    assert bool(dealt.short) == bool(dealt.left)
    assert dealt == deal(sizes, BUDGET, packs=packs, parts=parts)


def test_one_pack_takes_first_fit_in_the_given_order() -> None:
    sizes = [size(n, [], 0, 0) for n in (40, 50, 30, 20, 10)]
    assert deal(sizes, BUDGET, packs=1) == ([[0, 1, 4]], [2, 3], {"tokens"})


def test_a_pack_has_no_room_for_an_item_that_fits_no_part() -> None:
    """60 of 64 rows, in parts of 16."""
    assert deal([size(1, [12], 0, 0)] * 5, BUDGET, packs=1, parts=4) == ([[0, 1, 2, 3]], [4], {"image rows"})


def test_packs_have_about_equal_work_and_media() -> None:
    rng = np.random.default_rng(0)
    sizes = [size(int(rng.integers(1, 12)), [4] * int(rng.integers(0, 3)), 0, 0) for _ in range(64)]
    dealt = deal(sizes, Budget(100, rows={"image": 48}), packs=8)
    assert dealt.left == []
    for count in (lambda s: s.tokens, lambda s: s.tokens**2, lambda s: s.rows.get("image", 0)):
        loads = [sum(count(sizes[i]) for i in pack) for pack in dealt.packs]
        assert max(loads) < 1.12 * np.mean(loads)


def test_items_that_no_empty_pack_could_divide_are_named() -> None:
    words = r"document 1: its media does not fit 4 parts of a budget of .* rows, .* two parts: raise the budget"
    with pytest.raises(ValueError, match=words):
        deal([size(1, [], 0, 0), size(1, [12] * 5, 0, 0)], BUDGET, packs=2, parts=4)


def test_the_longest_item_goes_to_the_emptiest_part() -> None:
    assert item_parts([4, 8, 16, 4], parts=2, capacity=16) == [1, 1, 0, 1]
    assert item_parts([12, 12, 8], parts=2, capacity=16) is None
