"""What counts as a bad step, and the laws of leaving out batches."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.resilience.anomalies import BadSteps, History, Spikes, Verdict, judge, why_bad
from ftrain.resilience.rollback import plan_rollback
from ftrain.resilience.skipped import FILE, Rollback, Skipped, read_skipped, write_skipped

NAN, INF = math.nan, math.inf


def verdicts(policy, losses):
    history, found = History(), []
    for step, loss in enumerate(losses, start=1):
        history, verdict = judge(policy, history, step=step, loss=loss)
        found.append(verdict is Verdict.ROLL_BACK)
    return found


def test_after_so_many_bad_steps_in_a_row_the_run_rolls_back():
    assert verdicts(BadSteps(limit=2), [1.0, NAN, 1.0, INF, NAN]) == [False, False, False, False, True]
    assert verdicts(BadSteps(limit=1), [1.0, NAN]) == [False, True]
    assert verdicts(BadSteps(limit=0), [NAN] * 5) == [False] * 5


def test_a_gradient_norm_that_is_not_finite_is_bad():
    history, verdict = judge(BadSteps(limit=1), History(), step=4, loss=1.0, grad_norm=INF)
    assert (history.bad, verdict) == ((4,), Verdict.ROLL_BACK)


def test_a_spike_is_far_above_the_last_losses_and_never_below():
    policy = BadSteps(limit=1, spikes=Spikes(window=8, z=6.0))
    calm = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.1, 1.9]
    assert not any(verdicts(policy, [*calm, 2.3, 0.1]))
    assert verdicts(policy, [*calm, 5.0])[-1]
    assert not any(verdicts(policy, [*calm[:7], 5.0])), "too few losses to judge by"
    assert not any(verdicts(BadSteps(limit=1), [*calm, 5.0])), "off by default"


def test_a_spike_does_not_make_the_next_one_usual():
    policy = BadSteps(limit=3, spikes=Spikes(window=4, z=6.0))
    assert verdicts(policy, [1.0, 1.1, 0.9, 1.0, 9.0, 9.0, 9.0])[-1]


def test_losses_that_hardly_move_do_not_alarm():
    policy = BadSteps(limit=1, spikes=Spikes(window=4, z=8.0, least=0.01))
    assert not any(verdicts(policy, [1.0, 1.0, 1.0, 1.0, 1.05]))


losses = st.lists(st.one_of(st.floats(0.1, 10.0), st.just(NAN), st.just(INF)), max_size=30)


@given(losses, st.integers(1, 4), st.booleans())
def test_a_history_is_made_again_from_the_metrics(values, limit, spikes):
    policy = BadSteps(limit=limit, spikes=Spikes(window=4, z=3.0) if spikes else None)
    history = History()
    for step, loss in enumerate(values, start=1):
        history, _ = judge(policy, history, step=step, loss=loss)
    rows = [{"step": step, "loss": loss, "grad_norm": 0.0} for step, loss in enumerate(values, start=1)]
    assert History.of(policy, rows) == history
    assert (why_bad(policy, history, loss=NAN) is None) is False


positions = st.lists(st.integers(0, 30), max_size=8)


@given(positions, st.integers(0, 20), st.integers(1, 20))
def test_steps_take_the_positions_that_are_left_in_order(left_out, done, more):
    skipped = Skipped((Rollback(tuple(left_out), (1,), 0, "?"),))
    every = [p for p in range(80) if p not in left_out]
    last = done + more
    assert [skipped.position(step) for step in range(done + 1, last + 1)] == every[done:last]
    assert [p for a, b in skipped.ranges(done, last) for p in range(a, b)] == every[done:last]


@given(positions, positions)
def test_leaving_out_more_changes_no_step_before(left_out, more):
    before = Skipped((Rollback(tuple(left_out), (1,), 0, "?"),))
    after = before.after(Rollback(tuple(more), (2,), 0, "?"))
    for step in range(1, 30):
        if all(before.position(step) < p for p in more):
            assert after.position(step) == before.position(step)


def test_the_file_holds_what_was_written(tmp_path):
    assert read_skipped(tmp_path) == Skipped()
    skipped = Skipped((Rollback((4, 5), (5, 6), 3, "the loss is nan"), Rollback((9,), (8,), 0, "a spike")))
    write_skipped(tmp_path, skipped)
    assert read_skipped(tmp_path) == skipped
    (tmp_path / FILE).write_text('[{"positions": 3}]')
    with pytest.raises(ValueError, match=r"skipped\.json is not a list of rollbacks"):
        read_skipped(tmp_path)


def test_back_to_the_last_checkpoint_before_the_bad_steps():
    history, skipped = History(bad=(7, 8)), Skipped((Rollback((2,), (3,), 0, "?"),))
    found = plan_rollback(BadSteps(), history, skipped, saved=[2, 4, 7], why="the loss is nan")
    assert found == Rollback(positions=(7, 8), bad=(7, 8), back_to=4, why="the loss is nan")
    assert plan_rollback(BadSteps(), history, skipped, saved=[7], why="?").back_to == 0


def test_a_run_that_goes_back_again_and_again_gives_up():
    skipped = Skipped((Rollback((2,), (3,), 0, "?"),) * 2)
    with pytest.raises(RuntimeError, match=r"steps 7 to 8 are bad \(the loss is nan\).*gone back 2 times.*--step 8"):
        plan_rollback(BadSteps(rollbacks=2), History(bad=(7, 8)), skipped, saved=[], why="the loss is nan")


@pytest.mark.parametrize(
    "make", [lambda: BadSteps(limit=-1), lambda: Spikes(window=2), lambda: Spikes(z=0.0)], ids=["limit", "window", "z"]
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match=r"must be at least 0|a window of at least 4"):
        make()
