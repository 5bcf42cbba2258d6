"""One writer in a folder: who has the right to write, who has lost it, and what is in the lock's way."""

import os

import pytest

from ftrain.checkpoint import Checkpointer, SaveFailed, restore, save, steps
from tests.helpers.checkpoint_states import same_bits, training_state


def in_a_child(wait):
    """A child of this process, as the workers of a loader are, that lives until `wait` can be read."""
    child = os.fork()
    if child == 0:
        os.read(wait, 1)
        os._exit(0)
    return child


def test_a_child_of_the_writer_does_not_hold_the_lock(tmp_path):
    """Closed, the folder is free, whatever processes the writer has forked while it was open."""
    read, write = os.pipe()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(training_state(1), 1)
    checkpoints.wait()
    child = in_a_child(read)
    try:
        with pytest.raises(ValueError, match="is being written by process"):
            save(training_state(2), tmp_path, 2)
        checkpoints.close()
        save(training_state(2), tmp_path, 2)
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
    assert steps(tmp_path) == [1, 2]


def test_a_writer_that_is_killed_leaves_no_lock_with_its_children(tmp_path):
    read, write = os.pipe()
    told, tell = os.pipe()
    writer = os.fork()
    if writer == 0:
        checkpoints = Checkpointer(tmp_path)
        checkpoints._begin(1)
        os.write(tell, in_a_child(read).to_bytes(8, "little"))
        os.kill(os.getpid(), 9)
    os.waitpid(writer, 0)
    assert len(os.read(told, 8)) == 8
    try:
        save(training_state(2), tmp_path, 2)
    finally:
        os.write(write, b"x")
    assert steps(tmp_path) == [2]


def test_a_writer_whose_lock_was_removed_takes_it_again_or_stops(tmp_path):
    first, second = Checkpointer(tmp_path), Checkpointer(tmp_path)
    for step in (1, 2):
        first.save(training_state(step), step)
        first.wait()
        (tmp_path / ".writer").unlink()  # somebody tidies up
    first.save(training_state(3), 3)
    first.wait()
    (tmp_path / ".writer").unlink()
    second.save(training_state(4), 4)
    second.wait()
    with pytest.raises(ValueError, match=r"is being written by process .* two runs cannot share one folder"):
        first.save(training_state(5), 5)
    second.close()
    first.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert same_bits(restore(training_state(), tmp_path), training_state(4))


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(training_state(step), step)
            checkpoints.wait()
            (tmp_path / "run").rename(tmp_path / f"moved_{step}")
    assert (steps(tmp_path / "moved_1"), steps(tmp_path / "moved_2")) == ([1], [2])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: os.symlink("/nowhere", file)])
def test_what_is_in_the_way_of_the_lock_is_named(tmp_path, make):
    make(tmp_path / ".writer")
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(SaveFailed, match=rf"{tmp_path}/\.writer"):
        checkpoints.save(training_state(1), 1)
