"""The order of documents: a permutation for each epoch, and proportions that hold everywhere."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.data.mixture import by_temperature, by_tokens, checked_weights
from ftrain.data.order import Draw, Order

sizes_of_sources = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(deadline=None)
@given(sizes=sizes_of_sources, key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_each_epoch_has_each_row_once(sizes, key, epoch, shuffle):
    order = Order(sizes, key=key, shuffle=shuffle)
    drawn = [order[epoch * len(order) + k] for k in range(len(order))]
    assert Counter(drawn) == Counter(Draw(s, row) for s, size in enumerate(sizes) for row in range(size))
    if not shuffle:
        assert drawn == sorted(drawn)


@settings(deadline=None)
@given(sizes=sizes_of_sources, data=st.data())
def test_each_source_of_a_mixture_is_gone_through_in_passes(sizes, data):
    weights = data.draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes)))
    order = Order(sizes, key=1, weights=weights)
    drawn = [order[k] for k in range(order.cycle)]
    for source, size in enumerate(sizes):
        rows = [draw.row for draw in drawn if draw.source == source]
        assert set(rows) == set(range(size)), "a cycle has every row"
        passes = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert all(sorted(one) == list(range(size)) for one in passes)
        share = order.weights[source]
        counts = [sum(d.source == source for d in drawn[:k]) for k in (10, 50, len(drawn)) if k <= len(drawn)]
        marks = [k for k in (10, 50, len(drawn)) if k <= len(drawn)]
        assert all(abs(n - share * k) <= len(sizes) for n, k in zip(counts, marks, strict=True))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_large_source_is_shuffled_without_holding_its_order(epoch):
    order = Order([2**18 + 1], key=2)
    drawn = {order[epoch * len(order) + k].row for k in range(1000)}
    assert len(drawn) == 1000
    assert max(drawn) > 2**17 > min(drawn)


def test_keys_and_epochs_give_other_orders():
    def epoch(key, number):
        order = Order([50], key=key)
        return tuple(order[number * 50 + k] for k in range(50))

    assert len({epoch(key, number) for key in range(4) for number in range(4)}) == 16
    assert epoch(3, 2) == epoch(3, 2)


def test_orders_that_differ_have_other_fingerprints():
    orders = [
        Order([5, 6], key=0),
        Order([5, 6], key=1),
        Order([6, 5], key=0),
        Order([11], key=0),
        Order([5, 6], key=0, shuffle=False),
        Order([5, 6], key=0, weights=[1, 1]),
        Order([5, 6], key=0, weights=[1, 2]),
    ]
    assert len({order.fingerprint for order in orders}) == len(orders)
    assert all(0 <= order.fingerprint < 2**63 for order in orders)
    assert Order([5, 6], key=0).fingerprint == orders[0].fingerprint


def test_a_mixture_by_tokens_gives_tokens_in_their_shares():
    lengths = (100, 700)
    order = Order([300, 300], key=0, weights=by_tokens([0.25, 0.75], lengths))
    tokens = Counter()
    for k in range(2000):
        tokens[order[k].source] += lengths[order[k].source]
    assert tokens[1] / tokens.total() == pytest.approx(0.75, abs=0.005)


def test_temperature_draws_small_sources_more_often():
    assert by_temperature([90, 10], 1.0) == pytest.approx((0.9, 0.1))
    assert by_temperature([90, 10], 1e9) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Order([], key=0), "no sources"),
        (lambda: Order([3, 0], key=0), "source 1 has 0 rows"),
        (lambda: Order([2**32], key=0), "a source has 1 to 4294967295"),
        (lambda: Order([2**31, 2**31], key=0), "4294967296 rows of all sources"),
        (lambda: Order([3], key=0, weights=[1, 2]), "2 weights for 1 sources"),
        (lambda: checked_weights([1.0, 0.0], 2), "the weight of source 1 is 0.0"),
        (lambda: checked_weights([1.0, 1e-9], 2), "the smallest is below 1/10000"),
        (lambda: by_temperature([3, 4], 0.0), "a temperature of 0.0"),
        (lambda: by_temperature([3, 0], 1.0), "the weight of source 1 is 0.0"),
        (lambda: by_tokens([1, 1], [3.0]), "2 sources and mean tokens of 1"),
        (lambda: by_tokens([1, 1], [3.0, 0.0]), "source 1 has documents of 0.0 tokens"),
    ],
)
def test_an_order_that_cannot_be_is_one_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_places_count_from_zero():
    with pytest.raises(IndexError, match="place -1"):
        Order([3], key=0)[-1]
