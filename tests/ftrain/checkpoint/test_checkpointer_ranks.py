"""A Checkpointer on several ranks: what rank 0 decides holds for all, and an error of one is raised by all."""

import threading

import pytest
import torch

from ftrain.checkpoint import Checkpointer, Retention, SaveFailed, restore, save, steps
from ftrain.checkpoint import checkpointer as checkpointer_module
from ftrain.checkpoint.local import LocalFolder
from tests.helpers.checkpoint_states import same_bits, training_state
from tests.helpers.checkpoint_threads import on_all_ranks


def test_ranks_that_hold_copies_save_one_checkpoint_together(tmp_path):
    def train(ranks):
        with Checkpointer(tmp_path, ranks=ranks, keep=Retention(last=2)) as checkpoints:
            for step in (1, 2, 3):
                assert checkpoints.save(training_state(step), step)

    assert on_all_ranks(3, train) == [None] * 3
    assert steps(tmp_path) == [2, 3]
    assert same_bits(restore(training_state(), tmp_path), training_state(3))
    assert len(list((tmp_path / "global_step_3").glob("*/rank_*"))) >= 2


def test_a_skipped_save_is_skipped_by_all(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpointer_module.write_checkpoint

    def held(*args, ranks, **kwargs):
        if ranks.rank == 0:
            go.wait(20)
        write(*args, ranks=ranks, **kwargs)

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", held)
    everybody = threading.Barrier(3)

    def train(ranks):
        with Checkpointer(tmp_path, ranks=ranks, busy="skip") as checkpoints:
            begun = [checkpoints.save(training_state(1), 1), checkpoints.save(training_state(2), 2)]
            everybody.wait(20)
            go.set()
            checkpoints.wait()
            return [*begun, checkpoints.save(training_state(3), 3)]

    assert on_all_ranks(3, train) == [[True, False, True]] * 3
    assert steps(tmp_path) == [1, 3]


def test_a_folder_that_another_run_writes_refuses_all(tmp_path):
    with Checkpointer(tmp_path) as other:
        other.save(training_state(1), 1)

        def train(ranks):
            Checkpointer(tmp_path, ranks=ranks).save(training_state(2), 2)

        for error in on_all_ranks(2, train):
            assert isinstance(error, ValueError)
            assert "two runs cannot share one folder" in str(error)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_leaf_that_one_rank_cannot_save(tmp_path, bad):
    def train(ranks):
        leaf = object() if ranks.rank == bad else torch.zeros(3)
        with Checkpointer(tmp_path, ranks=ranks) as checkpoints:
            checkpoints.save({"params": leaf}, 1)

    errors = on_all_ranks(2, train)
    assert isinstance(errors[bad], ValueError)
    assert all("a checkpoint holds tensors, bool, int, float and str" in str(error) for error in errors)
    assert steps(tmp_path) == []


def test_after_a_failure_that_only_rank_0_has_raised_all_go_on(tmp_path, monkeypatch):
    """`check` finds a failure when it looks: at another step on each rank. The next save is one on all of them."""
    write = checkpointer_module.write_checkpoint

    def broken(store, step, *args, **kwargs):
        if step == 1:
            raise OSError(28, "No space left on device")
        write(store, step, *args, **kwargs)

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", broken)

    def train(ranks):
        with Checkpointer(tmp_path, ranks=ranks) as checkpoints:
            checkpoints.save(training_state(1), 1)
            if ranks.rank == 0:
                with pytest.raises(SaveFailed):
                    checkpoints.wait()
            return checkpoints.save(training_state(2), 2)

    assert on_all_ranks(2, train) == [True, True]
    assert steps(tmp_path) == [2]


def test_the_latest_step_is_what_rank_0_sees_and_all_restore_it(tmp_path, monkeypatch):
    """On a network file system a rank may still see the pointer, and the folder, as they were a minute ago."""
    for step in (250, 500):
        save(training_state(step), tmp_path, step)
    named, held = LocalFolder.named, LocalFolder.hold
    seen_by_1, looks = threading.local(), []

    def stale_named(self):
        return 250 if getattr(seen_by_1, "stale", False) else named(self)

    def stale_hold(self, step):
        if getattr(seen_by_1, "stale", False) and len(looks) < 3:
            looks.append(step)
            raise FileNotFoundError("not yet")
        return held(self, step)

    monkeypatch.setattr(LocalFolder, "named", stale_named)
    monkeypatch.setattr(LocalFolder, "hold", stale_hold)

    def resume(ranks):
        seen_by_1.stale = ranks.rank == 1
        checkpoints = Checkpointer(tmp_path, ranks=ranks)
        return checkpoints.latest(), checkpoints.restore(training_state())

    for step, state in on_all_ranks(2, resume):
        assert step == 500
        assert same_bits(state, training_state(500))
    assert looks == [500, 500, 500]


def test_a_rank_that_cannot_restore_is_named_to_all(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_SEEN_AFTER", 0.5)
    for folder, seed in (("a", 1), ("b", 2)):
        save(training_state(seed), tmp_path / folder, 7)

    def resume(ranks):
        Checkpointer(tmp_path / ("a" if ranks.rank != 2 else "b"), ranks=ranks).restore(training_state())

    *others, alone = on_all_ranks(3, resume)
    assert isinstance(alone, TimeoutError)
    assert "this rank sees another version of it: all ranks must share one folder" in str(alone)
    for error in others:
        assert isinstance(error, RuntimeError)
        assert "not all ranks could restore: rank 2: TimeoutError: rank 0 restores step 7" in str(error)


def test_a_place_that_rank_0_cannot_read_is_an_error_on_all(tmp_path):
    def resume(ranks):
        Checkpointer(tmp_path / "nowhere", ranks=ranks).restore(training_state())

    for error in on_all_ranks(2, resume):
        assert isinstance(error, ValueError)
        assert "holds no checkpoint" in str(error)
