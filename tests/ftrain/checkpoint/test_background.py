"""One write behind the loop: it writes a copy, and its failure is raised once, by the loop."""

import threading

import pytest
import torch

from ftrain.checkpoint import SaveFailed, open_store
from ftrain.checkpoint.background import BackgroundWriter
from ftrain.checkpoint.leaves import named_leaves


@pytest.fixture
def writer(tmp_path):
    return BackgroundWriter(open_store(tmp_path))


def test_a_thread_writes_the_state_as_it_was(writer):
    state, go, seen = {"w": torch.ones(3)}, threading.Event(), []

    def write(take):
        seen.append(take().tensors["w"].clone())
        go.wait()

    writer.start(1, named_leaves(state), state, write)
    state["w"] += 1  # waits for the copy
    assert writer.is_running
    go.set()
    writer.wait()
    assert not writer.is_running
    assert seen[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("behind", [True, False])
def test_a_failure_is_raised_once_by_the_next_wait(writer, behind):
    state = {"w": torch.ones(3)}
    leaves = named_leaves(state)

    def fail():
        if behind:
            writer.start(4, leaves, state, lambda take: 1 / 0)
        else:
            writer.run(4, leaves, lambda take: 1 / 0)
        writer.join()

    fail()
    with pytest.raises(SaveFailed, match=r"saving step 4 into .* failed: division by zero; no step was saved before"):
        writer.wait()
    writer.wait()
    fail()
    writer.forget_failure()
    writer.wait()
