"""Waits that are no hang: code that makes a process wait for its storage says so here, and a watchdog gives it time.

A process has one main thread and at most one watchdog, so this is kept once per process.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_open: dict[int, tuple[float, str]] = {}
_ended = 0.0


@contextmanager
def expected_wait(what: str, *, seconds: float) -> Iterator[None]:
    """Within the block this process may wait for `what`, for `seconds` at most, without being taken for hung."""
    global _ended
    key = id(mark := object())
    with _lock:
        _open[key] = (time.monotonic() + seconds, what)
    try:
        yield
    finally:
        with _lock:
            del _open[key]
            _ended = time.monotonic()
        del mark


def excused_until(grace: float) -> tuple[float, str]:
    """The time (of `time.monotonic`, in seconds) up to which a wait is expected, and for what.

    After the end of a wait it is `grace` seconds later, for "". (0.0, "") where there was none.
    """
    with _lock:
        if _open:
            return max(_open.values())
        return (_ended + grace if _ended else 0.0), ""
