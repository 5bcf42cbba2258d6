"""Budgets: what documents take of them, and how they grow."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.modules.budget import Bound, Budget, Size, first_fit, needs, total_budget

BUDGET = Budget(
    128,
    rows={"image": 48, "audio": 80},
    targets={"draw": 4},
    bounds={"tokens": Bound(6), "image": Bound(3, 24), "audio": Bound(5)},
)
PER_TOKEN = {"image": 4, "audio": 8}


def size(tokens: int, *, image: tuple[int, ...] = (), audio: tuple[int, ...] = (), draw: int = 0) -> Size:
    items = {name: list(rows) for name, rows in {"image": image, "audio": audio}.items() if rows}
    return Size(tokens, {name: sum(rows) for name, rows in items.items()}, {"draw": draw} if draw else {}, items)


def test_a_document_takes_of_everything_that_is_limited() -> None:
    found = needs([size(9, image=(8, 16), draw=1), size(3, audio=(8,))], BUDGET)
    assert dict(zip(found.names, found.needs_ND[0], strict=True)) == {
        "tokens": 9, "image rows": 24, "audio rows": 0, "draw targets": 1, "documents": 1, "image items": 2,
        "audio items": 0,
    }  # fmt: skip
    assert found.limits_D.tolist() == [128, 48, 80, 4, 6, 3, 5]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (size(129), r"document 1 needs 129 tokens \(the budget holds 128\)"),
        (size(1, draw=5), r"5 draw targets \(the budget holds 4\)"),
        (size(1, image=(8,) * 4), r"4 image items \(the budget holds 3\)"),
        (size(1, image=(28,)), r"28 image rows in one item, more than the budget's longest, 24: .*bounds\['image'\]"),
    ],
)
def test_a_document_that_never_fits_is_named(wanted: Size, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        needs([size(1), wanted], BUDGET)


def test_the_total_holds_exactly_all() -> None:
    sizes = [size(9, image=(8, 16), draw=1), size(3, audio=(8,))]
    assert first_fit(needs(sizes, total_budget(sizes))) == ([0, 1], [])
    less = replace(total_budget(sizes), tokens=11)
    assert first_fit(needs(sizes, less)) == ([0], [1])


@given(st.sets(st.sampled_from(sorted(BUDGET.limits)), min_size=1), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=40)
def test_a_budget_grows_where_it_is_short_and_still_divides(short: set[str], parts: int) -> None:
    grown = BUDGET.grown(frozenset(short), parts=parts, rows_per_token=PER_TOKEN)
    for what, limit in BUDGET.limits.items():
        assert grown.limits[what] >= limit + max(1, limit // 4) if what in short else grown.limits[what] == limit
    for name, rows in grown.rows.items():
        assert (rows - BUDGET.rows[name]) % (parts * PER_TOKEN[name]) == 0
    assert grown.tokens % 32 == 0
    assert (grown.targets["draw"] - 4) % parts == 0
    assert grown.bounds["image"].longest == 24
