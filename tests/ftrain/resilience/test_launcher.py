"""A rank hears of the end of torchrun, also where torchrun does not handle the signal that ends it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftrain.resilience.launcher import launcher_heard

_HEAD = """
import os, sys, time
import ftrain
from ftrain.resilience.signals import interruptible

log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)

def say(word):
    os.write(log, f"{word} {os.getpid()}\\n".encode())

"""
_LOOP = """
with interruptible() as stop:
    say("started")
    while not stop.requested:
        time.sleep(0.05)
say("saved")
say("ended")
"""
_SESSION = """
try:
    with ftrain.run.session() as run:
        say("started")
        for step in run.steps(0, 10**6):
            time.sleep(0.05)
        say("saved")
except SystemExit as end:
    say("ended" if end.code == 75 else f"failed with {end.code}")
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "prctl"), reason="only Linux tells a process of its parent's end")
@pytest.mark.parametrize(("job", "number"), [(_LOOP, signal.SIGUSR1), (_SESSION, signal.SIGKILL)])
def test_ranks_save_and_end_when_a_signal_ends_their_torchrun(tmp_path, job, number):
    log, script = tmp_path / "log", tmp_path / "job.py"
    log.touch()
    script.write_text(_HEAD + job)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen([*launcher, str(script), str(log)], stderr=subprocess.DEVNULL) as torchrun:
        try:
            ranks = [int(line.split()[-1]) for line in _lines(log, "started", 2)]
            torchrun.send_signal(number)
            assert torchrun.wait(30) == -number
        finally:
            torchrun.terminate()
    try:
        _lines(log, "saved", 2)
        _lines(log, "ended", 2)
        assert all(_ends(rank) for rank in ranks)
    finally:
        for rank in ranks:
            if _runs(rank):
                os.kill(rank, signal.SIGKILL)


def _lines(log: Path, word: str, count: int) -> list[str]:
    """The lines that begin with this word, once there are so many, or after a minute."""
    deadline = time.monotonic() + 60
    while True:
        found = [line for line in log.read_text().splitlines() if line.startswith(word)]
        if len(found) >= count or time.monotonic() > deadline:
            assert len(found) == count, log.read_text()
            return found
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _runs(pid)


def test_under_slurm_a_torchrun_that_does_not_handle_its_signal_is_said_at_the_start(monkeypatch, caplog):
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("RANK", "0"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT")
    with launcher_heard():
        pass
    (words,) = caplog.messages
    assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1" in words
    assert "experiments/launch/slurm.sh" in words


@pytest.mark.parametrize(
    ("name", "value"), [("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1"), ("RANK", "1"), ("SLURM_JOB_ID", None)]
)
def test_nothing_is_said_where_the_signal_arrives_or_another_rank_says_it(monkeypatch, caplog, name, value):
    for other, given in (("TORCHELASTIC_RUN_ID", "a"), ("RANK", "0"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(other, given)
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with launcher_heard():
        pass
    assert not caplog.messages


def test_after_the_block_a_parents_end_does_what_it_did_before(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    before = _parents_signal()
    with launcher_heard():
        assert _parents_signal() == signal.SIGTERM
    assert _parents_signal() == before


def _parents_signal() -> int:
    number = ctypes.c_int(0)
    assert ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0) == 0
    return number.value
