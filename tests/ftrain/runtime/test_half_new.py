"""A step that fails while it writes its new state over the old one: the half new state is refused, never trained on."""

import signal
import time

import pytest
import torch

import ftrain
from ftrain.checkpoint import Checkpointer
from ftrain.runtime.half_new import is_half_new

GOOD, BAD = torch.tensor([0, 1]), torch.tensor([0, 7])


def looked_up(state, ids):
    """`n` is written first; then the lookup of a wrong id fails."""
    n = state["n"] + 1
    return {"n": n, "w": state["w"] + state["w"][ids].sum() + n}, {}


def early(state, ids):
    """The lookup of a wrong id fails before anything is written."""
    w = state["w"][ids].sum() + state["w"]
    return {"n": state["n"] + w.sum(), "w": w}, {}


def fresh():
    return {"n": torch.zeros(()), "w": torch.ones(4)}


@pytest.mark.parametrize("runs_before", [0, 1, 3])
def test_a_half_new_state_is_refused_by_every_step(runs_before):
    step, other, state = ftrain.jit(looked_up, donate="state"), ftrain.jit(looked_up), fresh()
    for _ in range(runs_before):
        state, _ = step(state, GOOD)
    with pytest.raises(IndexError):
        step(state, BAD)
    for again in (step, other):
        with pytest.raises(ValueError, match=r"leaf 'state.n' is half new: a step failed with IndexError .*restore it"):
            again(state, GOOD)
    with pytest.raises(ValueError, match=r"leaf 'state.w' is half new"):
        state["w"] + 1


@pytest.mark.parametrize("runs_before", [0, 1, 3])
def test_a_failure_before_the_first_write_leaves_the_state(runs_before):
    step, state = ftrain.jit(early, donate="state"), fresh()
    for _ in range(runs_before):
        state, _ = step(state, GOOD)
    kept = {name: leaf.clone() for name, leaf in state.items()}
    with pytest.raises(IndexError):
        step(state, BAD)
    assert all(torch.equal(kept[name], state[name]) for name in kept)
    expected, _ = early(kept, GOOD)
    new, _ = step(state, GOOD)
    assert all(torch.equal(expected[name], new[name]) for name in new)


def interrupted(step, state, after):
    """The state that a program holds when Ctrl-C comes this many seconds after it began to run steps."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        for _ in range(1000):
            state, _ = step(state)
        pytest.fail("the alarm did not ring")
    except KeyboardInterrupt:
        return state
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_after_an_interrupt_no_step_goes_on_from_a_half_new_state():
    step = ftrain.jit(lambda state: ({k: torch.sin(v) + 1 for k, v in state.items()}, {}), donate="state")
    state = {f"w{i:02d}": torch.zeros(100_000) for i in range(60)}
    for _ in range(3):
        began = time.perf_counter()
        state, _ = step(state)
        took = time.perf_counter() - began
    state = interrupted(step, state, after=took / 2)
    if not any(map(is_half_new, state.values())):  # it came between two steps
        assert len({leaf[0].item() for leaf in state.values()}) == 1
        return
    with pytest.raises(ValueError, match="is half new: a step failed with KeyboardInterrupt"):
        step(state)


def test_a_checkpoint_is_restored_over_a_half_new_state_and_is_not_made_of_one(tmp_path):
    step, state = ftrain.jit(looked_up, donate="state"), fresh()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, 1)
        checkpoints.wait()
        with pytest.raises(IndexError):
            step(state, BAD)
        with pytest.raises(ValueError, match="is half new"):
            checkpoints.save(state, 2)
        restored = checkpoints.restore(state, 1)
    assert all(torch.equal(restored[name], fresh()[name]) for name in restored)
    step(restored, GOOD)
