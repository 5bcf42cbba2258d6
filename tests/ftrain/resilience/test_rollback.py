"""A training loop that meets poisoned batches ends with the numbers of one that never met them."""

import math

import pytest
import torch

import ftrain
from ftrain import checkpoint, optim, tree
from ftrain.checkpoint import Checkpointer
from ftrain.resilience.anomalies import BadSteps, History, Spikes, Verdict, judge, why_bad
from ftrain.resilience.rollback import carry_out, plan_rollback
from ftrain.resilience.skipped import Rollback, Skipped, read_skipped, write_skipped

STEPS = 16
TX = optim.skip_nonfinite(optim.adamw(0.05))


def make_state():
    params = {"w": torch.zeros(3)}
    return ftrain.TrainState.create(params, TX)


@ftrain.jit
def step(state, batch):
    def loss_fn(params):
        return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()

    loss, grads = ftrain.value_and_grad(loss_fn)(state.params)
    return state.apply(TX, grads), {"loss": loss}


def batch_at(position, poison):
    numbers = torch.Generator().manual_seed(position)
    x = torch.randn(8, 3, generator=numbers)
    return {"x": x * poison.get(position, 1.0), "y": x @ torch.tensor([1.0, -2.0, 0.5])}


def train(run, poison, policy, *, stop_after=None, every=4):
    """Train in the folder `run` to the end or so many steps; the metrics of the steps that count, and the state."""
    root = run / "checkpoints"
    skipped, rows = read_skipped(run), torch.load(run / "rows") if (run / "rows").exists() else []
    with Checkpointer(root) as checkpoints:
        done = checkpoints.latest() or 0
        state = checkpoints.restore(make_state()) if done else make_state()
        history, began = History.of(policy, rows[:done]), done
        while done < STEPS and (stop_after is None or done < began + stop_after):
            done += 1
            state, metrics = step(state, batch_at(skipped.position(done), poison))
            loss = float(metrics["loss"])
            rows[done - 1 :] = [{"step": done, "loss": loss, "grad_norm": 0.0}]
            why = why_bad(policy, history, loss=loss)
            history, verdict = judge(policy, history, step=done, loss=loss)
            if done % every == 0 and not history.bad:
                checkpoints.save(state, done)
            if verdict is Verdict.ROLL_BACK:
                checkpoints.wait()
                rollback = plan_rollback(policy, history, skipped, saved=checkpoints.steps(), why=why)
                skipped = carry_out(rollback, skipped, run=run, checkpoints=root)
                done = rollback.back_to
                state = checkpoints.restore(make_state(), done) if done else make_state()
                history = History.of(policy, rows[:done])
        if stop_after is not None:
            checkpoints.save(state, done)
    torch.save(rows[:done], run / "rows")
    return rows[:done], state


def never_met(tmp_path, positions):
    """A run that leaves out these batches from the start."""
    clean = tmp_path / "never"
    clean.mkdir()
    write_skipped(clean, Skipped((Rollback(tuple(positions), (), 0, "left out from the start"),)))
    return train(clean, {}, BadSteps())


def assert_same(found, expected):
    assert [r["loss"] for r in found[0]] == [r["loss"] for r in expected[0]]
    assert all(map(torch.equal, tree.leaves(found[1]), tree.leaves(expected[1])))


NANS = {9: math.nan, 10: math.inf}


@pytest.mark.parametrize("limit", [1, 2])
def test_planted_nans_leave_no_trace(tmp_path, limit):
    run = tmp_path / "run"
    run.mkdir()
    found = train(run, NANS, BadSteps(limit=limit))
    assert read_skipped(run).positions == (9, 10)
    assert_same(found, never_met(tmp_path, NANS))


def test_planted_nans_before_the_first_checkpoint(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    found = train(run, {1: math.nan}, BadSteps(limit=1))
    assert read_skipped(run).rollbacks[0].back_to == 0
    assert_same(found, never_met(tmp_path, [1]))


def test_a_spike_leaves_no_trace(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    policy = BadSteps(limit=1, spikes=Spikes(window=4, z=20.0))
    found = train(run, {9: 1e4}, policy)
    assert read_skipped(run).positions == (9,)
    assert_same(found, never_met(tmp_path, [9]))


@pytest.mark.parametrize("after", [9, 10, 12], ids=["before", "between the bad steps", "after the rollback"])
def test_a_stop_in_between_changes_nothing(tmp_path, after):
    run = tmp_path / "run"
    run.mkdir()
    train(run, NANS, BadSteps(limit=2), stop_after=after)
    found = train(run, NANS, BadSteps(limit=2))
    assert_same(found, never_met(tmp_path, NANS))


def test_one_bad_step_below_the_limit_is_only_skipped(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows, state = train(run, {9: math.nan}, BadSteps(limit=2))
    assert read_skipped(run) == Skipped()
    assert math.isnan(rows[9]["loss"])
    assert math.isfinite(rows[-1]["loss"])
    assert int(state.opt_state.skipped_total) == 1


def test_checkpoints_of_bad_steps_are_removed_before_the_list_is_written(tmp_path):
    root = tmp_path / "checkpoints"
    for number in (4, 6):
        checkpoint.save({"w": torch.zeros(2)}, root, number)
    rollback = Rollback((5, 6), (6, 7), 4, "the loss is nan")
    after = carry_out(rollback, Skipped(), run=tmp_path, checkpoints=root)
    assert checkpoint.steps(root) == [4]
    assert checkpoint.latest(root) == 4
    assert read_skipped(tmp_path) == after == Skipped((rollback,))


def test_a_checkpoint_after_which_all_batches_are_bad_is_bad_itself(tmp_path):
    """A NaN came into a parameter after the loss of step 8, and was saved with it."""
    policy, skipped, run = BadSteps(limit=2), Skipped(), tmp_path / "run"
    run.mkdir()
    for step in (4, 8):
        checkpoint.save({"w": torch.zeros(2)}, run / "checkpoints", step)
    for first, back_to, left in ((9, 8, [4, 8]), (9, 4, [4]), (5, 4, [4]), (5, 0, [])):
        history = History(bad=(first, first + 1))
        saved = checkpoint.steps(run / "checkpoints")
        rollback = plan_rollback(policy, history, skipped, saved=saved, why="the loss is nan")
        assert rollback.back_to == back_to
        skipped = carry_out(rollback, skipped, run=run, checkpoints=run / "checkpoints")
        assert checkpoint.steps(run / "checkpoints") == left
    assert read_skipped(run) == skipped
