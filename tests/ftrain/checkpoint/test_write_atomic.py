"""A step exists or does not: what a crash between any two actions of a save leaves, and what readers make of it."""

import shutil

import pytest

from ftrain.checkpoint import delete, durable, latest, restore, save, steps
from tests.helpers.checkpoint_states import same_bits, training_state


def stopped_while_writing(root):
    shutil.copytree(root / "global_step_1", root / "global_step_2.tmp-0a1b")
    (root / "global_step_2.tmp-0a1b" / "manifest.json").unlink()


def stopped_before_the_rename(root):
    shutil.copytree(root / "global_step_1", root / "global_step_2.tmp-0a1b")


def stopped_before_latest(root):
    (root / "latest_checkpointed_iteration.txt").write_text("1\n")


def stopped_while_replacing_latest(root):
    (root / "latest_checkpointed_iteration.txt.tmp-77").write_text("")


def stopped_while_deleting(root):
    shutil.copytree(root / "global_step_1" / "model", root / "global_step_0.old-ff" / "model")


STOPS = [
    (stopped_while_writing, 1),
    (stopped_before_the_rename, 1),
    (stopped_before_latest, 2),
    (stopped_while_replacing_latest, 1),
    (stopped_while_deleting, 1),
]


@pytest.mark.parametrize(("stop", "saved"), STOPS)
def test_readers_see_whole_steps_and_the_next_save_cleans_up(tmp_path, stop, saved):
    for step in range(1, saved + 1):
        save(training_state(step), tmp_path, step)
    stop(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert latest(tmp_path) == 1
    assert steps(tmp_path) == list(range(1, saved + 1))
    assert same_bits(restore(training_state(), tmp_path), training_state(1))
    assert sorted(tmp_path.iterdir()) == before
    save(training_state(3), tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".writer",
        "global_step_1",
        "global_step_2",
        "latest_checkpointed_iteration.txt",
    ]
    assert same_bits(restore(training_state(), tmp_path), training_state(3))


@pytest.mark.parametrize("text", [None, "", "99\n", "not a number"])
def test_a_lost_latest_file_falls_back_to_the_highest_step(tmp_path, text):
    save(training_state(4), tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    if text is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert latest(tmp_path) == 4


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_step_is_replaced_where_names_cannot_be_exchanged_too(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(durable, "_exchange", lambda a, b: False)
    for seed in (1, 2):
        save(training_state(seed), tmp_path, 5)
    assert same_bits(restore(training_state(), tmp_path), training_state(2))
    assert [p.name for p in tmp_path.glob("global*")] == ["global_step_5"]


def test_delete_moves_latest_first(tmp_path):
    for step in (1, 2):
        save(training_state(step), tmp_path, step)
    delete(tmp_path, 2)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    delete(tmp_path, 1)
    assert latest(tmp_path) is None
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
    with pytest.raises(ValueError, match="holds no step 1; it holds none"):
        delete(tmp_path, 1)


def test_a_reader_makes_nothing(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restore({}, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
