"""That the end of torchrun is heard by the ranks below it.

torchrun starts each rank in a session of its own, and passes on the signals that it handles (`--signals-to-handle`).
Any other one ends it at once: its ranks would go on with nobody above them, and never learn that they were to stop.
"""

import ctypes
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_SET_PARENT_DEATH_SIGNAL, _GET_PARENT_DEATH_SIGNAL = 1, 2  # of linux/prctl.h
_HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"  # torchrun's default
_log = logging.getLogger("ftrain.resilience")


@contextmanager
def launcher_heard() -> Iterator[None]:
    """Within the block the end of a torchrun above this process arrives here as SIGTERM, whatever ended it (on Linux).

    Where that comes too late, rank 0 logs a warning with the way out: Slurm's SIGUSR1 ends a torchrun that does not
    handle it, and Slurm kills what is left of the job when torchrun has ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    before = _signal_of_parents_end(signal.SIGTERM)
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", _HANDLED)
    unheard = before is None or "SLURM_JOB_ID" in os.environ
    if unheard and "SIGUSR1" not in handled and os.environ.get("RANK") == "0":
        _log.warning(
            "torchrun ends at SIGUSR1 without waiting for its ranks, so this run could not save: start it with "
            "--signals-to-handle %s,SIGUSR1 (and a --shutdown-timeout above the seconds of a save), or let Slurm start "
            "the ranks as experiments/launch/slurm.sh does",
            handled,
        )
    try:
        yield
    finally:
        _signal_of_parents_end(before or 0)


def _signal_of_parents_end(number: int) -> int | None:
    """Let this process get this signal (0: none) when its parent ends; the one before. None where nobody can."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return None
    before = ctypes.c_int(0)
    if prctl(_GET_PARENT_DEATH_SIGNAL, ctypes.byref(before), 0, 0, 0):
        return None
    return None if prctl(_SET_PARENT_DEATH_SIGNAL, ctypes.c_ulong(number), 0, 0, 0) else before.value
