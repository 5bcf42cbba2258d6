"""Saves that go on behind the steps: what blocks, what is skipped, and how a failed write is told."""

import logging
import re
import resource
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch

from ftrain import tree
from ftrain.checkpoint import Checkpointer, Retention, SaveFailed, restore, save, steps
from ftrain.checkpoint import checkpointer as checkpointer_module
from tests.helpers.checkpoint_states import same_bits, training_state

MIB = 2**20


@contextmanager
def file_size_limit(size):
    """No file may grow beyond `size` bytes: what a full disk looks like to the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def held_write(monkeypatch):
    """Writes that begin only when the event is set."""
    go = threading.Event()
    write = checkpointer_module.write_checkpoint

    def held(*args, **kwargs):
        go.wait()
        write(*args, **kwargs)

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", held)
    yield go
    go.set()


@pytest.mark.parametrize("background", [True, False])
def test_a_run_saves_resumes_and_keeps_the_last(tmp_path, background):
    with Checkpointer(tmp_path / "run", keep=Retention(last=2), background=background) as checkpoints:
        assert checkpoints.latest() is None
        for step in (10, 20, 30):
            assert checkpoints.save(training_state(step), step)
    with Checkpointer(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == [20, 30]
        assert same_bits(checkpoints.restore(training_state()), training_state(30))


def test_what_is_saved_is_the_state_at_the_call(tmp_path, held_write):
    state = training_state(1)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, 1)
        for leaf in tree.leaves(state):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()
        assert checkpoints.latest() is None
        held_write.set()
    assert same_bits(restore(state, tmp_path), training_state(1))


def test_a_save_while_another_is_written_is_skipped_and_says_so(tmp_path, held_write, caplog):
    with Checkpointer(tmp_path, busy="skip") as checkpoints:
        assert checkpoints.save(training_state(1), 1)
        with caplog.at_level(logging.WARNING):
            assert not checkpoints.save(training_state(2), 2)
        assert "step 2 is not saved: the previous save is still being written" in caplog.text
        held_write.set()
        checkpoints.wait()
        assert checkpoints.save(training_state(3), 3)
    assert steps(tmp_path) == [1, 3]


def test_the_spare_memory_is_used_again(tmp_path, monkeypatch):
    seen = []
    write = checkpointer_module.write_checkpoint

    def spy(root, step, leaves, **options):
        seen.append({path: tensor.data_ptr() for path, tensor in leaves().tensors.items()})
        write(root, step, leaves, **options)

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", spy)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.reserve(training_state())
        for step in (1, 2, 3):
            checkpoints.save(training_state(step), step)
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0].values())) == len(seen[0])


def test_a_leaf_may_change_its_shape_between_saves(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        for rows in (6, 9):
            checkpoints.save(training_state(rows, rows=rows), rows)
        assert same_bits(checkpoints.restore(training_state(rows=9)), training_state(9, rows=9))


def test_a_write_that_fails_is_raised_later_and_harms_nothing(tmp_path):
    large = {"params": {"w": torch.randn(MIB)}}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(large, 1)
    checkpoints.wait()
    with file_size_limit(MIB):
        checkpoints.save(large, 2)
        message = (
            rf"saving step 2 into {re.escape(str(tmp_path))} failed: .*{re.escape(str(tmp_path))}.*last good step is 1"
        )
        with pytest.raises(SaveFailed, match=message):
            checkpoints.wait()
    assert sorted(p.name for p in tmp_path.glob("global*")) == ["global_step_1"]
    assert same_bits(checkpoints.restore(large), large)
    checkpoints.save(large, 3)
    checkpoints.close()
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("ask", [Checkpointer.wait, Checkpointer.close, lambda c: c.save(training_state(), 2)])
def test_every_later_call_raises_the_failure_once(tmp_path, ask):
    checkpoints = Checkpointer(tmp_path)
    with file_size_limit(100):
        checkpoints.save(training_state(1), 1)
        checkpoints._writer.join()
    with pytest.raises(SaveFailed, match="no step was saved before"):
        ask(checkpoints)
    checkpoints.wait()
    checkpoints.close()


def test_check_never_waits(tmp_path, held_write):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(training_state(1), 1)
        checkpoints.check()
        assert checkpoints.latest() is None
        held_write.set()


def test_a_full_disk(small_disk):
    state = {"params": {"w": torch.randn(MIB // 2)}}
    checkpoints = Checkpointer(small_disk)
    checkpoints.save(state, 1)
    checkpoints.save(state, 2)
    with pytest.raises(SaveFailed, match=r"No space left on device.*last good step is 1"):
        checkpoints.wait()
    assert same_bits(checkpoints.restore(state), state)
    checkpoints.close()


def test_a_read_only_folder(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SaveFailed, match=rf"saving step 1 into {small_disk} failed: .*Read-only file system"):
        Checkpointer(small_disk).save(training_state(), 1)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed, match=rf"Not a directory: '{tmp_path}/file"):
        Checkpointer(tmp_path / "file" / "run").save(training_state(), 1)


def test_two_runs_on_one_folder(tmp_path):
    with Checkpointer(tmp_path) as first, Checkpointer(tmp_path) as second:
        first.save(training_state(1), 1)
        with pytest.raises(ValueError, match=r"being written by process \d+ on .*two runs cannot share one folder"):
            second.save(training_state(2), 2)
        with pytest.raises(ValueError, match="two runs cannot share"):
            save(training_state(2), tmp_path, 2)
        first.wait()
        assert same_bits(second.restore(training_state()), training_state(1))
        first.close()
        second.save(training_state(2), 2)
    assert steps(tmp_path) == [1, 2]


def test_metrics_decide_what_is_best(tmp_path):
    keep = Retention(last=1, best=1, metric="loss")
    with Checkpointer(tmp_path, keep=keep) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan"))]:
            checkpoints.save(training_state(step), step, metrics={"loss": loss})
    assert steps(tmp_path) == [2, 4]


def test_the_latest_stays_when_a_run_was_rolled_back(tmp_path):
    """After a rollback the last saved step is not the highest one; it must outlive the policy all the same."""
    with Checkpointer(tmp_path, keep=Retention(last=1)) as checkpoints:
        checkpoints.save(training_state(50), 50)
        checkpoints.save(training_state(20), 20)
    assert same_bits(restore(training_state(), tmp_path), training_state(20))


def test_a_failed_save_does_not_hide_the_error_that_ends_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "write_checkpoint", lambda *args, **kwargs: 1 / 0)

    def run(error):
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(training_state(1), 1)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    with pytest.raises(SaveFailed):
        run(None)
