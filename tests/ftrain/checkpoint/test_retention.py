"""Which steps stay: a pure function of steps and metrics."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.checkpoint import Retention, to_delete

metrics = st.dictionaries(st.sampled_from(["loss", "bleu"]), st.floats(width=16), max_size=2)
histories = st.dictionaries(st.integers(0, 200), metrics, max_size=12)
policies = st.builds(
    lambda last, every, best, lower: Retention(last, every, best, "loss" if best else None, lower),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 50),
    st.integers(0, 3),
    st.booleans(),
)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Retention(), [10, 20, 30, 40, 50, 60]),
        (Retention(last=2), [50, 60]),
        (Retention(last=1, every=20), [20, 40, 60]),
        (Retention(last=1, best=2, metric="loss"), [20, 40, 60]),
        (Retention(last=1, best=2, metric="loss", lower_is_better=False), [10, 50, 60]),
    ],
    ids=repr,
)
def test_policies(keep, kept):
    losses = {10: 9.0, 20: 1.0, 30: math.nan, 40: 2.0, 50: 8.0}
    steps = {step: {"loss": loss} for step, loss in losses.items()} | {60: {}}
    assert sorted(set(steps) - set(to_delete(steps, keep))) == kept


@given(steps=histories, keep=policies, protected=st.integers(0, 200))
def test_what_is_promised_stays_and_nothing_else(steps, keep, protected):
    deleted = set(to_delete(steps, keep, protected=protected))
    kept = set(steps) - deleted
    assert deleted <= set(steps) - {protected}
    assert keep.last is not None or not deleted
    newest = sorted(steps)[-(keep.last or len(steps)) :]
    assert kept >= set(newest)
    if keep.last is not None:
        multiples = {step for step in kept if keep.every and step % keep.every == 0}
        assert len(kept - set(newest) - multiples - {protected}) <= keep.best


@given(steps=histories, keep=policies)
def test_a_second_pass_deletes_nothing(steps, keep):
    kept = {step: steps[step] for step in set(steps) - set(to_delete(steps, keep))}
    assert to_delete(kept, keep) == []


@pytest.mark.parametrize("options", [{"last": 0}, {"every": 0}, {"best": 2}, {"metric": "loss"}])
def test_policies_that_make_no_sense(options):
    with pytest.raises(ValueError, match="Retention"):
        Retention(**options)
