"""Saves, metrics and output of a run outlive disks and readers that fail for a while."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.omni.survival import Guard, spared_output
from ftrain.checkpoint import Checkpointer
from ftrain.checkpoint import checkpointer as checkpointer_module
from ftrain.resilience.anomalies import BadSteps, Verdict
from ftrain.resilience.signals import EXIT_NOT_SAVED
from ftrain.run import folder as run_folder
from ftrain.run import row_log
from ftrain.run.folder import RunFolder
from ftrain.run.progress import Report, SteadyConsole
from ftrain.run.row_log import RowLog
from ftrain.run.saves import NotSaved, Saves

ROOT = Path(__file__).resolve().parents[2]
STATE = {"w": torch.zeros(3)}


@pytest.fixture
def disk(monkeypatch):
    """Set `disk["fails"]` to a number: so many writes of a checkpoint fail from then on."""
    state, write = {"fails": 0}, checkpointer_module.write_checkpoint

    def failing(*args, **kwargs):
        if state["fails"] > 0:
            state["fails"] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", failing)
    monkeypatch.setattr("ftrain.run.saves._PAUSES", (0.0, 0.0, 0.0))
    return state


def train(checkpoints, said, steps, *, every=4, most_failed=3):
    """A loop as the experiment's: saves are due every so many steps, and the last one must be there."""
    saves = Saves(checkpoints, None, say=said.append, most_failed=most_failed)
    for step in range(1, steps + 1):
        if step == steps:
            saves.save_now(STATE, step)
        elif saves.wanted(step) or step % every == 0:
            saves.save(STATE, step)
        checkpoints._writer.join()  # so that the test does not hang on the clock
    return saves


def test_a_disk_that_is_full_for_a_while_costs_one_save(tmp_path, disk):
    disk["fails"], said = 1, []
    with Checkpointer(tmp_path) as checkpoints:
        saves = train(checkpoints, said, steps=21, every=5)
        assert saves.held
        assert checkpoints.steps() == [10, 15, 20, 21]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert said[0].endswith("the run goes on")


def test_a_last_save_that_fails_is_tried_again_at_once(tmp_path, disk):
    disk["fails"], said = 2, []
    with Checkpointer(tmp_path) as checkpoints:
        assert train(checkpoints, said, steps=3).held
        assert checkpoints.steps() == [3]
        disk["fails"] = 99
        assert not train(checkpoints, said, steps=3).held, "the run ends with EXIT_NOT_SAVED"
        disk["fails"] = 0


def test_a_disk_that_stays_full_ends_the_run(tmp_path, disk):
    disk["fails"], said = 99, []
    with pytest.raises(NotSaved) as ended, Checkpointer(tmp_path) as checkpoints:
        train(checkpoints, said, steps=1000, most_failed=3)
    assert ended.value.code == EXIT_NOT_SAVED
    assert said[-1] == "4 saves in a row have failed: the run ends"


def test_metrics_are_on_the_disk_before_the_checkpoint_that_lies_behind_them(tmp_path, monkeypatch):
    seen = []
    with RunFolder.create(tmp_path / "run", {}) as files, Checkpointer(tmp_path / "run" / "checkpoints") as checkpoints:
        monkeypatch.setattr(row_log.os, "fsync", lambda descriptor: seen.append("metrics"))
        monkeypatch.setattr(checkpoints, "save", lambda *args, **options: seen.append("checkpoint"))
        Saves(checkpoints, files, say=print, most_failed=1).save(STATE, 1)
    assert seen == ["metrics", "checkpoint"]


def test_rows_that_the_disk_refuses_wait_and_come_whole(tmp_path, monkeypatch, caplog):
    log, write, space = RowLog(tmp_path / "rows"), os.write, [12]

    def full(descriptor, data):
        if not space[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[: space[0]])
        space[0] -= done
        return done

    monkeypatch.setattr(row_log.os, "write", full)
    for row in ("first\n", "second\n", "third\n"):
        log.append(row)
    assert (tmp_path / "rows").read_text() == "first\n", "the half of a row is taken back"
    assert caplog.text.count("No space left on device") == 1
    space[0] = 1000
    log.append("fourth\n")
    log.close()
    assert (tmp_path / "rows").read_text() == "first\nsecond\nthird\nfourth\n"


def test_rows_that_never_found_space_are_told_at_the_end(tmp_path, monkeypatch, caplog):
    log = RowLog(tmp_path / "rows")
    monkeypatch.setattr(row_log.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    log.append("row\n")
    log.close()
    assert "lacks its last 1 lines" in caplog.text


def test_the_same_run_started_twice_is_refused_before_it_touches_anything(tmp_path):
    """Also while the first one has not saved yet: the folder itself is locked."""
    run = tmp_path / "run"
    first = RunFolder.create(run, {})
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 1.0})
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    second = (
        "import sys; from pathlib import Path; from ftrain.run.folder import RunFolder\n"
        "RunFolder.resume(Path(sys.argv[1]), step=1)"
    )
    made = subprocess.run([sys.executable, "-c", second, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert f"run is being written by process {os.getpid()} on" in made.stderr
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    first.close()
    RunFolder.resume(run, step=1).close()
    assert [row["step"] for row in run_folder.read_metrics(run)] == [1]


def test_a_gap_in_the_metrics_is_said(tmp_path, caplog):
    with RunFolder.create(tmp_path / "run", {}) as files:
        files.log({"step": 1})
    RunFolder.resume(tmp_path / "run", step=4).close()
    assert "lacks 3 of the steps up to 4 (2 to 4)" in caplog.text


def test_going_back_needs_no_space(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "run", {}) as files:
        for step in (1, 2, 3):
            files.log({"step": step})
        monkeypatch.setattr(run_folder, "write_text", lambda *_: pytest.fail("wrote the file anew"))
        files.go_back(1)
        files.log({"step": 2, "again": True})
    assert run_folder.read_metrics(tmp_path / "run") == [{"step": 1}, {"step": 2, "again": True}]


def test_the_umask_of_a_run_is_kept(tmp_path):
    before = os.umask(0o077)
    try:
        with RunFolder.create(tmp_path / "run", {}) as files:
            files.log({"step": 1})
            files.summarise({})
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "run").iterdir()} == {0o600}


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff"])
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        run_folder.read_config(tmp_path)


def row(step, loss):
    return {"step": step, "loss": loss, "grad_norm": 1.0}


def test_a_run_does_not_end_on_a_step_that_is_not_finite(tmp_path):
    with RunFolder.create(tmp_path / "run", {}) as files:
        guard = Guard(BadSteps(limit=3), tmp_path / "run", done=0, last=3)
        for step, loss, verdict in ((1, 1.0, Verdict.GO_ON), (2, float("nan"), Verdict.GO_ON), (3, 9.0, Verdict.GO_ON)):
            files.log(row(step, loss))
            assert guard.look(row(step, loss), {"x": torch.zeros(1)}) is verdict
            assert guard.finite == (step != 2)
    guard = Guard(BadSteps(limit=3), tmp_path / "run", done=2, last=3)
    assert not guard.finite
    assert guard.look(row(3, float("inf")), {"x": torch.zeros(1)}) is Verdict.ROLL_BACK
    never = Guard(BadSteps(limit=0), tmp_path / "run", done=2, last=3)
    assert never.look(row(3, float("inf")), {"x": torch.zeros(1)}) is Verdict.GO_ON
    assert not never.finite, "the run ends with EXIT_NOT_FINITE"


def test_a_file_that_nobody_needs_does_not_end_the_run(caplog):
    with spared_output("step.html"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "step.html could not be written: [Errno 28] No space left on device" in caplog.text


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_log_does_not_end_the_run():
    with Report(2, every=1, console=SteadyConsole(file=Full())) as report:
        report.say("words")
        report.update({"step": 1, "loss": 1.0})
        report.show("a table")


READER_GOES = """
import logging, time
from ftrain.run.progress import Report
with Report(100, every=1) as report:
    for step in range(1, 101):
        report.update({"step": step, "loss": 1.0})
        time.sleep(0.001)
open("done", "w").close()
"""


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    command = f"{sys.executable} -c '{READER_GOES}' | head -1; exit ${{PIPESTATUS[0]}}"
    made = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (made.returncode, made.stderr) == (0, b"")
    assert made.stdout.startswith(b"step 1/100")
    assert (tmp_path / "done").exists()
