"""A command in a box of seconds: it is stopped with all that it started, and its output is kept."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_PATIENCE = 5.0
"""Seconds that killed processes have to be gone."""


class Ran(NamedTuple):
    """How a command ended ("ok", "exit 1", "stopped after 60 s"), after how many seconds, and the lines it printed."""

    ended: str
    seconds: float
    lines: list[str]


def run_boxed(command: Sequence[str], *, seconds: float, folder: Path, environment: Mapping[str, str]) -> Ran:
    """Run a command in a session of its own; when it ends, or its time is over, whatever is left of it is killed."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
            ended = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            _kill_session(child)
        output.seek(0)
        return Ran(ended, time.monotonic() - began, output.read().splitlines())


def _kill_session(child: subprocess.Popen) -> None:
    """Kill the command if it still runs, and workers that outlived it; wait a little, for they may hold the card."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            os.killpg(child.pid, 0)  # raises as soon as nobody is left
            time.sleep(0.05)
    child.wait()
