"""A program that works on fixed addresses gives what the same calls give without it, wherever their arguments lie."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.cudagraph import Record, Recorded

W, N, X = range(3)


def program(inputs):
    """A step that writes over `w` and `n` and returns a number."""
    w, n, x = inputs
    w.mul_(0.5).add_(x)
    n.add_(1)
    return [w.sum() + n]


class Recorder:
    """What a card does, on a CPU: a record works on the tensors it was made with and always puts its results in one
    place.
    """

    def __init__(self, device_type="cpu"):
        self.records = 0
        self.memory = ArgumentMemory({W, N}, device_type=device_type)
        self.step = Recorded(program, lambda f, inputs: f(inputs), self.record, self.memory, ["w", "n", "x"])

    def record(self, f, inputs):
        self.records += 1
        results = f([x.clone() for x in inputs])

        def replay():
            for kept, new in zip(results, f(inputs), strict=True):
                kept.copy_(new)

        return Record(replay, results)


def state():
    return [torch.arange(4.0), torch.zeros(())]


def batch(i):
    return torch.full((4,), float(i))


def same(ours, theirs):
    assert all(map(torch.equal, ours, theirs))


def test_a_state_is_used_in_place_and_a_batch_is_copied():
    recorder, mine, eager = Recorder(), state(), state()
    addresses = [x.data_ptr() for x in mine]
    for i in range(8):
        x = batch(i)
        same(recorder.step([*mine, x]), program([*eager, batch(i)]))
        assert torch.equal(x, batch(i))
    same(mine, eager)
    assert recorder.records == 1
    assert recorder.memory._own == {X}
    assert [x.data_ptr() for x in mine] == addresses


def test_a_state_at_another_place_is_recorded_again_and_the_old_one_stays():
    recorder, first = Recorder(), state()
    for i in range(6):
        recorder.step([*first, batch(i)])
    kept, restored, eager = [x.clone() for x in first], state(), state()
    for i in range(6):
        same(recorder.step([*restored, batch(i)]), program([*eager, batch(i)]))
    same(restored, eager)
    same(first, kept)
    assert recorder.records == 2
    assert recorder.memory._own == {X}


def test_a_state_that_is_restored_before_the_recording_is_used_in_place():
    recorder, eager = Recorder(), state()
    recorder.step([*state(), batch(0)])
    mine = state()
    for i in range(6):
        same(recorder.step([*mine, batch(i)]), program([*eager, batch(i)]))
    assert recorder.records == 1
    assert recorder.memory._own == {X}


def test_two_states_in_turn_are_copied_and_not_recorded_for_ever():
    recorder, mine, eager = Recorder(), [state(), state()], [state(), state()]
    for i in range(12):
        same(recorder.step([*mine[i % 2], batch(i)]), program([*eager[i % 2], batch(i)]))
    for ours, theirs in zip(mine, eager, strict=True):
        same(ours, theirs)
    assert recorder.records <= 3
    assert recorder.memory._own == {W, N, X}


def test_a_batch_that_comes_again_and_again_is_not_written_over_when_another_comes():
    recorder, mine, eager, x = Recorder(), state(), state(), batch(7)
    for _ in range(6):
        same(recorder.step([*mine, x]), program([*eager, batch(7)]))
    assert recorder.memory._own == set()
    for i in range(6):
        same(recorder.step([*mine, batch(i)]), program([*eager, batch(i)]))
    assert torch.equal(x, batch(7))
    assert recorder.memory._own == {X}


def test_results_are_the_callers_to_keep():
    recorder, mine = Recorder(), state()
    results = [recorder.step([*mine, batch(i)])[0] for i in range(6)]
    kept = copy.deepcopy(results)
    recorder.step([*mine, batch(9)])
    same(results, kept)


def test_a_value_of_the_host_that_changes_is_recorded_again_and_said():
    recorder, eager = Recorder(device_type="cuda"), state()  # all arguments are the host's
    inputs = [torch.zeros(4), torch.tensor(float("nan")), batch(0)]
    for _ in range(3):
        recorder.step(inputs)
    recorder.memory.settle(inputs)
    assert recorder.memory.moved([x.clone() for x in inputs]) == []
    assert recorder.memory.moved([inputs[W], inputs[N], batch(1)]) == [X]
    assert recorder.memory.moved([-inputs[W], inputs[N], batch(0)]) == [W]  # -0.0 is another number
    for i in range(3):
        recorder.step([*eager, batch(i)])
    with pytest.warns(UserWarning, match=r"captured four times in \d calls, since .*'x' changed"):
        recorder.step([*eager, batch(3)])


MOVES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=5, max_size=20)


@settings(max_examples=100, deadline=None)
@given(moves=MOVES)
def test_any_order_of_states_and_batches_gives_the_numbers_of_eager_calls(moves):
    """States: two that live on, and a fresh copy of the first; batches: three that stay, and a fresh one."""
    recorder, mine, eager = Recorder(), [state(), state()], [state(), state()]
    batches = [batch(i) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many recordings
        for i, (s, b) in enumerate(moves):
            if s == 2:
                mine[0] = [x.clone() for x in mine[0]]
            x = batches[b] if b < 3 else batch(10 + i)
            expected = program([*eager[s % 2], x.clone()])
            same(recorder.step([*mine[s % 2], x]), expected)
            for ours, theirs in zip(mine, eager, strict=True):
                same(ours, theirs)
            same(batches, [batch(i) for i in range(3)])
