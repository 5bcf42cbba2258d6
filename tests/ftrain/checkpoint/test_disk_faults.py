"""Disks that refuse, file systems that lack something, names that are in the way: saves go on, or say why not."""

import errno
import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftrain.checkpoint import Checkpointer, Retention, SaveFailed, delete, durable, latest, restore, save, steps
from ftrain.checkpoint import ages as ages_module
from ftrain.checkpoint import local as local_module
from ftrain.checkpoint import lock as lock_module
from ftrain.checkpoint import read as read_module
from tests.helpers.checkpoint_states import same_bits, training_state

ROOT = Path(__file__).resolve().parents[3]
POINTER = "latest_checkpointed_iteration.txt"


def names(root):
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize("step", [5.0, "5", None, -1, True, 10**15])
def test_a_step_that_is_no_whole_number_is_refused_and_nothing_is_left(tmp_path, step):
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(ValueError, match="a step is a whole number from 0"):
        checkpoints.save(training_state(1), step)
    with pytest.raises(ValueError, match="a step is a whole number from 0"):
        save(training_state(1), tmp_path, step)
    assert names(tmp_path) == []


def test_a_step_may_be_a_tensor(tmp_path):
    save(training_state(1), tmp_path, torch.tensor(5))
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize("content", [b"\xb1\n", b"9" * 5000, b"", b"-1", "٣".encode(), b"\0" * 99])
def test_a_pointer_that_cannot_be_read_is_no_pointer_and_is_mended(tmp_path, content):
    for step in (1, 2):
        save(training_state(step), tmp_path, step)
    (tmp_path / POINTER).write_bytes(content)
    assert latest(tmp_path) == 2
    save(training_state(3), tmp_path, 3)
    assert (tmp_path / POINTER).read_text() == "3\n"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/nowhere", p), lambda p: os.symlink(p, p)])
def test_a_pointer_of_another_kind_is_replaced(tmp_path, make):
    save(training_state(1), tmp_path, 1)
    (tmp_path / POINTER).unlink()
    make(tmp_path / POINTER)
    assert latest(tmp_path) == 1
    save(training_state(2), tmp_path, 2)
    assert (tmp_path / POINTER).read_text() == "2\n"


def test_old_is_what_was_written_first(tmp_path):
    """The run goes back from 5000 to 4000; without the pointer too, it never jumps to 5000."""
    with Checkpointer(tmp_path, keep=Retention(last=2)) as checkpoints:
        for step in (4000, 5000, 4010, 4020):
            checkpoints.save(training_state(step), step)
            checkpoints.wait()
        assert checkpoints.steps() == [4010, 4020]
    save(training_state(9), tmp_path, 9)
    for _ in ("with the pointer", "without"):
        assert latest(tmp_path) == 9
        (tmp_path / POINTER).unlink(missing_ok=True)
    delete(tmp_path, 9)
    assert latest(tmp_path) == 4020


def test_the_order_grows_where_the_clock_goes_back(tmp_path, monkeypatch):
    save(training_state(7), tmp_path, 7)
    monkeypatch.setattr("ftrain.checkpoint.ages.time.time_ns", lambda: 5)
    save(training_state(3), tmp_path, 3)
    (tmp_path / POINTER).unlink()
    assert latest(tmp_path) == 3


def test_a_copy_made_while_the_run_was_not_well_takes_no_good_one_s_place(tmp_path):
    with Checkpointer(tmp_path, keep=Retention(last=2)) as checkpoints:
        for step, good in ((4, True), (8, True), (9, False), (10, False)):
            checkpoints.save(training_state(step), step, good=good)
            checkpoints.wait()
        assert checkpoints.steps() == [4, 8, 10]
        assert checkpoints.latest() == 10


class Killed(BaseException):
    """What a kill between two calls looks like: nothing after it is done."""


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_kill_while_a_step_is_replaced_loses_no_version(tmp_path, monkeypatch, killed_at):
    """Where names cannot be exchanged the old version goes aside first, and counts until the new one is there."""
    save(training_state(1), tmp_path, 7)
    monkeypatch.setattr(durable, "_exchange", lambda a, b: False)
    monkeypatch.setattr(local_module._NewFolder, "abort", lambda self: None)
    rename, calls = os.rename, []

    def dying(a, b):
        calls.append(b)
        if len(calls) == killed_at:
            raise Killed
        rename(a, b)

    with monkeypatch.context() as dies:
        dies.setattr(durable.os, "rename", dying)
        with pytest.raises(Killed):
            save(training_state(2), tmp_path, 7)
    whole = 2 if killed_at == 3 else 1
    assert (steps(tmp_path), latest(tmp_path)) == ([7], 7)
    assert same_bits(restore(training_state(), tmp_path), training_state(whole))
    save(training_state(8), tmp_path, 8)
    assert names(tmp_path) == [".writer", "global_step_7", "global_step_8", POINTER]
    assert same_bits(restore(training_state(), tmp_path, 7), training_state(whole))


def test_a_step_that_was_moved_to_another_disk_is_used_and_let_go(tmp_path, caplog):
    root, other = tmp_path / "run", tmp_path / "other"
    save(training_state(1), root, 1)
    (root / "global_step_1").rename(other)
    (root / "global_step_1").symlink_to(other)
    assert same_bits(restore(training_state(), root), training_state(1))
    with Checkpointer(root, keep=Retention(last=2)) as checkpoints:
        for step in (2, 3, 4):
            checkpoints.save(training_state(step), step)
            checkpoints.wait()
    assert names(root) == [".writer", "global_step_3", "global_step_4", POINTER]
    assert (other / "manifest.json").exists(), "of a link only the link is removed"


def test_what_cannot_be_deleted_holds_up_no_save(tmp_path, monkeypatch, caplog):
    """A file that is immutable, or that NFS keeps as long as somebody has it open."""
    remove = local_module.shutil.rmtree

    def stuck(path, **options):
        if "global_step_1" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        remove(path, **options)

    monkeypatch.setattr(durable.shutil, "rmtree", stuck)
    with Checkpointer(tmp_path, keep=Retention(last=1)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(training_state(step), step)
            checkpoints.wait()
        assert checkpoints.steps() == [5]
    assert "step 1 of" in caplog.text
    assert "which an interrupted save has left, could not be removed" in caplog.text
    (left,) = tmp_path.glob("*.old-*")
    assert left.name.count(".old-") == 1, "its name does not grow"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_and_it_is_said(tmp_path, monkeypatch, caplog, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    save(training_state(1), tmp_path, 1)
    assert steps(tmp_path) == [1]
    assert "is on a file system without locks" in caplog.text


def test_a_disk_that_refuses_the_lock_s_file_does_not_keep_the_lock(tmp_path, monkeypatch):
    """Also when the caller keeps the error, and with it the frames that it came through."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpointer(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(lock_module.os, "pwrite", full)
        with pytest.raises(SaveFailed, match="No space left on device") as kept:
            checkpoints.save(training_state(1), 1)
    checkpoints.save(training_state(1), 1)
    checkpoints.close()
    assert steps(tmp_path) == [1]
    assert kept.value.__traceback__ is not None


def test_a_lock_s_file_that_is_a_link_or_a_pipe_is_not_written(tmp_path):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / ".writer").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic link"):
        save(training_state(1), tmp_path, 1)
    assert (tmp_path / "precious").read_text() == "years of work"


def test_modes_are_those_of_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        save(training_state(1), tmp_path, 1)
    finally:
        os.umask(before)
    wide = [p for p in tmp_path.rglob("*") if stat.S_IMODE(p.lstat().st_mode) & 0o077]
    assert wide == []


@pytest.mark.parametrize("replaced", [1, 3])
def test_a_restore_is_of_one_version_while_the_step_is_replaced(tmp_path, monkeypatch, replaced):
    """Whatever has been read when the step is written again: what comes back is the old version or the new one."""
    save(training_state(1), tmp_path, 7)
    check, left = read_module.check_files, [replaced]

    def then_replaced(held, manifest, parts):
        if left[0]:
            left[0] -= 1
            save(training_state(10 + left[0]), tmp_path, 7)  # the folder that is held is deleted
        check(held, manifest, parts)

    monkeypatch.setattr(read_module, "check_files", then_replaced)
    assert same_bits(restore(training_state(), tmp_path), training_state(10))


def test_a_restore_reads_on_from_a_folder_that_was_renamed(tmp_path, monkeypatch):
    save(training_state(1), tmp_path, 7)
    read = read_module._read

    def renamed_before(*args):
        (tmp_path / "global_step_7").rename(tmp_path / "global_step_7.old-00")
        save(training_state(2), tmp_path, 7)
        read(*args)

    with monkeypatch.context() as patched:
        patched.setattr(read_module, "_read", renamed_before)
        patched.setattr(local_module, "_remove_leftovers", lambda root: None)
        found = restore(training_state(), tmp_path)
    assert same_bits(found, training_state(1)), "all of it from the folder whose manifest was read"


def test_a_step_that_is_written_again_without_end_is_told(tmp_path, monkeypatch):
    save(training_state(1), tmp_path, 7)

    def replaced(held, manifest, parts):
        save(training_state(2), tmp_path, 7)
        raise OSError(errno.ENOENT, "gone")

    monkeypatch.setattr(read_module, "check_files", replaced)
    with pytest.raises(ValueError, match="was written to whenever step 7 was read"):
        restore(training_state(), tmp_path, 7)


WRITER = """
import sys, torch
from ftrain.checkpoint import save
step = 0
while True:
    step += 1
    save({"params": {"a": torch.full((40_000,), float(step)), "b": torch.full((300,), float(step))}, "n": step},
         sys.argv[1], 1)
"""


@pytest.mark.slow
def test_restores_beside_a_process_that_saves_the_same_step_again_and_again(tmp_path):
    state = {"params": {"a": torch.zeros(40_000), "b": torch.zeros(300)}, "n": 0}
    save(state, tmp_path, 1)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT)
    seen = set()
    try:
        while len(seen) < 5:
            assert writer.poll() is None
            found = restore(state, tmp_path, 1)
            values = {float(v) for leaf in found["params"].values() for v in (leaf.min(), leaf.max())}
            assert values == {float(found["n"])}
            seen |= values
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert same_bits(restore(state, tmp_path, 1), restore(state, tmp_path, 1))


def stale(store):
    raise OSError("stale handle")


def test_retention_that_cannot_list_keeps_all(tmp_path, monkeypatch, caplog):
    with Checkpointer(tmp_path, keep=Retention(last=1), background=False) as checkpoints:
        checkpoints.save(training_state(1), 1)
        monkeypatch.setattr(
            "ftrain.checkpoint.clean.kept", lambda store: (_ for _ in ()).throw(OSError("stale handle"))
        )
        with caplog.at_level(logging.WARNING):
            checkpoints.save(training_state(2), 2)
    assert steps(tmp_path) == [1, 2]
    assert "could not be listed, so none was deleted: stale handle" in caplog.text


def test_a_step_whose_manifest_cannot_be_read_is_never_deleted_by_retention(tmp_path):
    with Checkpointer(tmp_path, keep=Retention(last=1)) as checkpoints:
        checkpoints.save(training_state(1), 1)
        checkpoints.wait()
        (tmp_path / "global_step_1" / "manifest.json").write_text("of a newer version, or torn")
        for step in (2, 3):
            checkpoints.save(training_state(step), step)
            checkpoints.wait()
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), os.mkfifo, lambda p: p.symlink_to("/nowhere")])
def test_what_has_the_name_of_a_step_is_replaced_by_the_step(tmp_path, make):
    save(training_state(1), tmp_path, 1)
    make(tmp_path / "global_step_2")
    save(training_state(2), tmp_path, 2)
    assert (steps(tmp_path), latest(tmp_path)) == ([1, 2], 2)
    assert names(tmp_path) == [".writer", "global_step_1", "global_step_2", POINTER]


def test_an_old_version_that_cannot_be_deleted_fails_no_save(tmp_path, monkeypatch, caplog):
    """When the new one has the name the save is done; the rest is housekeeping."""
    save(training_state(1), tmp_path, 1)
    save(training_state(2), tmp_path, 2)
    real = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        real(path, ignore_errors=True)

    with monkeypatch.context() as stuck:
        stuck.setattr(durable.shutil, "rmtree", busy)
        save(training_state(7), tmp_path, 1)
    assert latest(tmp_path) == 1
    assert same_bits(restore(training_state(), tmp_path), training_state(7))
    assert "global_step_1" in caplog.text
    assert "could not be removed" in caplog.text
    save(training_state(3), tmp_path, 3)
    assert names(tmp_path) == [".writer", "global_step_1", "global_step_2", "global_step_3", POINTER]


def test_a_step_that_somebody_else_has_deleted_is_deleted(tmp_path):
    save(training_state(1), tmp_path, 1)
    local_module.LocalFolder(tmp_path).delete(9)
    assert steps(tmp_path) == [1]


def test_a_folder_is_the_same_one_wherever_the_process_goes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as checkpoints:
        checkpoints.save(training_state(1), 1)
        checkpoints.wait()
        monkeypatch.chdir(tmp_path / "elsewhere")
        checkpoints.save(training_state(2), 2)
    assert steps(tmp_path / "run") == [1, 2]
    assert names(tmp_path / "elsewhere") == []


def test_a_path_may_go_up(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    save(training_state(1), tmp_path / "link/../run", 1)
    assert steps(tmp_path / "a" / "run") == [1]


def test_the_order_grows_where_a_run_goes_back_after_the_clock_did(tmp_path, monkeypatch):
    """Steps 4 and 5 were written under a clock that was days ahead; then the run goes on from 3."""
    now = [10**18]
    monkeypatch.setattr(ages_module.time, "time_ns", lambda: now[0])
    for step in (1, 2, 3):
        save(training_state(step), tmp_path, step)
    now[0] += 10**15
    for step in (4, 5):
        save(training_state(step), tmp_path, step)
    now[0] -= 10**15
    (tmp_path / POINTER).write_text("3\n")
    with Checkpointer(tmp_path, keep=Retention(last=2)) as checkpoints:
        for step in (6, 7):
            checkpoints.save(training_state(step), step)
            checkpoints.wait()
    assert steps(tmp_path) == [6, 7]
    (tmp_path / POINTER).unlink()
    assert latest(tmp_path) == 7


def test_a_file_that_the_disk_cannot_give_is_named(tmp_path, monkeypatch):
    save(training_state(1), tmp_path, 1)
    real, answers = os.read, []

    def read(descriptor, count):
        if answers and answers[-1] == b"" and len([a for a in answers if a == b""]) == 1:
            raise OSError(errno.EIO, "Input/output error")
        answers.append(real(descriptor, count))
        return answers[-1]

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(ValueError, match=rf"{tmp_path}/global_step_1/\S+ cannot be read \(.*Input/output error"):
        restore(training_state(), tmp_path, 1)
