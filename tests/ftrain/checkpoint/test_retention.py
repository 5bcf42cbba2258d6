"""Which steps stay: a pure function of what is known of the steps, in the order in which they were written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.checkpoint import Retention, to_delete
from ftrain.checkpoint.ages import Kept

metrics = st.dictionaries(st.sampled_from(["loss", "bleu"]), st.floats(width=16), max_size=2)
kept_steps = st.builds(Kept, st.integers(0, 200), good=st.booleans(), metrics=metrics)
histories = st.lists(kept_steps, max_size=12, unique_by=lambda found: found.step)
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
    steps = [Kept(step, metrics={"loss": loss}) for step, loss in losses.items()] + [Kept(60)]
    assert sorted({*losses, 60} - set(to_delete(steps, keep))) == kept


def test_old_is_what_was_written_first_not_what_has_a_low_number():
    """The run went back from 5000 to 4000, and on from there."""
    steps = [Kept(4000), Kept(5000), Kept(4010), Kept(4020)]
    assert to_delete(steps, Retention(last=2)) == [4000, 5000]


def test_copies_made_while_the_run_was_not_well_take_no_good_one_s_place():
    steps = [Kept(4), Kept(8), Kept(9, good=False), Kept(10, good=False)]
    assert to_delete(steps, Retention(last=2)) == [9]  # the newest is where the run goes on
    assert to_delete([*steps, Kept(12)], Retention(last=2)) == [4, 9, 10]


@given(steps=histories, keep=policies, protected=st.integers(0, 200))
def test_what_is_promised_stays_and_nothing_else(steps, keep, protected):
    numbers = {found.step for found in steps}
    deleted = set(to_delete(steps, keep, protected=protected))
    kept = numbers - deleted
    assert deleted <= numbers - {protected}
    assert keep.last is not None or not deleted
    good = [found.step for found in steps if found.good]
    newest = {*good[-(keep.last or len(steps)) :], *(found.step for found in steps[-1:])}
    assert kept >= newest
    if keep.last is not None:
        multiples = {step for step in kept if keep.every and step % keep.every == 0}
        assert len(kept - newest - multiples - {protected}) <= keep.best


@given(steps=histories, keep=policies)
def test_a_second_pass_deletes_nothing(steps, keep):
    deleted = to_delete(steps, keep)
    assert to_delete([found for found in steps if found.step not in deleted], keep) == []


@pytest.mark.parametrize("options", [{"last": 0}, {"every": 0}, {"best": 2}, {"metric": "loss"}])
def test_policies_that_make_no_sense(options):
    with pytest.raises(ValueError, match="Retention"):
        Retention(**options)
